"""Ids and what is learnt of them against TRL's own preparation, in its trainers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_prep.records.samples import (
    FAMILIES,
    conversations,
    ids_and_masks,
    make_folder,
    prepared,
    trl_template,
)

TEXT = ["A short text.", "Ends itself.<|im_end|>", "caf\u00e9 \u65e5\u672c\n\n  def f(x):\n\treturn x", "a" * 300]
PAIRS = [
    {"prompt": "The sky is", "completion": " blue."},
    {"prompt": "return Non", "completion": "e if x else self"},  # a token goes over the border
    {"prompt": "Two lines\n", "completion": "\nand more<|im_end|>"},
    {"prompt": "\u65e5\u672c", "completion": "\u8a9e"},
]
PREFERENCES = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, I think."},
    {"prompt": "return Non", "chosen": "e if x", "rejected": "sense"},
    {"prompt": "Why", "chosen": "? Because.<|im_end|>", "rejected": "? No."},
]
IMPLICIT = [
    {"chosen": "Q: why? A: so it is", "rejected": "Q: why? A: never"},
    {"chosen": "One two  three", "rejected": "One two  four five"},
]


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers: one that puts <s> before plain text, and some with a template."""
    root = tmp_path_factory.mktemp("folders")
    made = {"bos": make_folder(base, root / "bos", None, "<s>", "<|im_end|>", add_bos=True)}
    config = made["bos"] / "tokenizer_config.json"  # which says otherwise than tokenizer.json, and is not heard
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_bos_token": False, "add_eos_token": True}))
    for family in ("qwen2_5", "llama3", "gemma", "phi3", "qwen3", "deepseekv3_training"):
        name = family.removesuffix("_training")
        made[name] = make_folder(base, root / name, trl_template(family), *FAMILIES[name])
    return made


def trainer_of(kind: str, folder: Path, records: list[dict[str, Any]], output: Path) -> Any:
    """TRL's trainer over a tiny model, for what it makes of the data set."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=len(tokenizer), n_positions=512)
    model = AutoModelForCausalLM.from_config(config)
    args: dict[str, Any] = {"output_dir": str(output), "max_length": None, "use_cpu": True, "report_to": []}
    shared: dict[str, Any] = {
        "model": model,
        "train_dataset": Dataset.from_list(records),
        "processing_class": tokenizer,
    }
    if kind == "sft":
        return SFTTrainer(args=SFTConfig(**args), **shared)
    return DPOTrainer(args=DPOConfig(**args), ref_model=AutoModelForCausalLM.from_config(config), **shared)


def sft(folder: Path, records: list[dict[str, Any]], output: Path) -> list[list[tuple[list[int], list[int]]]]:
    rows = trainer_of("sft", folder, records, output).train_dataset
    return [[(row["input_ids"], [int(label != -100) for label in row["labels"]])] for row in rows]


def dpo(folder: Path, records: list[dict[str, Any]], output: Path) -> list[list[tuple[list[int], list[int]]]]:
    rows = trainer_of("dpo", folder, records, output).train_dataset
    return [
        [
            (row["prompt_ids"] + row[key], [0] * len(row["prompt_ids"]) + [1] * len(row[key]))
            for key in ("chosen_ids", "rejected_ids")
        ]
        for row in rows
    ]


@pytest.mark.parametrize("family", ["bos", "qwen2_5"])
def test_plain_text_and_completions(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for records in ([{"text": text} for text in TEXT], PAIRS):
        assert ids_and_masks(prepared(tmp_path, folders[family], records)) == sft(
            folders[family], records, tmp_path / "trl"
        )


@pytest.mark.parametrize("family", ["qwen2_5", "llama3", "gemma", "phi3", "qwen3", "deepseekv3"])
def test_conversational_completions(
    family: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = conversations(15, system=family != "gemma")
    records = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
    if family != "gemma":
        records += [{"prompt": chat[:-3], "completion": chat[-3:]} for chat in chats if len(chat) > 3]
    assert ids_and_masks(prepared(tmp_path, folders[family], records)) == sft(
        folders[family], records, tmp_path / "trl"
    )


@pytest.mark.parametrize("family", ["bos", "qwen2_5"])
@pytest.mark.parametrize("records", [PREFERENCES, IMPLICIT])
def test_plain_preferences(family: str, records: list[Any], folders: dict[str, Path], tmp_path: Path) -> None:
    store = prepared(tmp_path, folders[family], records, kind="dpo")
    assert ids_and_masks(store) == dpo(folders[family], records, tmp_path / "trl")


@pytest.mark.parametrize("family", ["qwen2_5", "llama3", "gemma", "phi3", "qwen3"])
@pytest.mark.parametrize("implicit", [False, True])
def test_conversational_preferences(family: str, implicit: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    for number, chat in enumerate(conversations(12, system=family != "gemma")):
        other = [{**chat[-1], "content": f"rather {number} not"}]
        if implicit:
            records.append({"chosen": chat, "rejected": chat[:-1] + other})
        else:
            records.append({"prompt": chat[:-1], "chosen": chat[-1:], "rejected": other})
    store = prepared(tmp_path, folders[family], records, kind="auto")
    assert store.records.kind == "dpo"
    assert ids_and_masks(store) == dpo(folders[family], records, tmp_path / "trl")


def test_prompts_that_are_no_beginning_are_told(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = prepared(tmp_path, folders["bos"], PAIRS)
    assert store.manifest.counts["with a prompt that is no beginning of the whole"] >= 1
    assert "with a prompt that is no beginning of the whole: what is learnt begins where" in capsys.readouterr().err
