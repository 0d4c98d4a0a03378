"""Tokenizers with the special tokens of real families, conversations that try their templates, and stores of them."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.unit.data_prep.samples import stdlib_texts
from zeropipe.data_prep.cli import main
from zeropipe.data_prep.store import BEGINS, TRAINED, TokenStore

# family: the bos and eos token that its models have
FAMILIES: dict[str, tuple[str | None, str]] = {
    "qwen2_5": (None, "<|im_end|>"),
    "qwen3": (None, "<|im_end|>"),
    "qwen3_instruct_2507": (None, "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<end_of_turn>"),
    "gemma3": ("<bos>", "<end_of_turn>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "phi3_5": ("<s>", "<|endoftext|>"),
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseekv3": ("<s>", "<｜end▁of▁sentence｜>"),
    "lfm2": ("<s>", "<|im_end|>"),
    "gptoss": (None, "<|return|>"),
    "glm4moe": (None, "<|user|>"),
}
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<s>", "<|system|>",
    "<|user|>", "<|assistant|>", "<|end|>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
    "<｜Assistant｜>", "<｜User｜>", "<｜end▁of▁sentence｜>", "<|start|>", "<|message|>", "<|return|>", "<|channel|>",
    "<|call|>",
]  # fmt: skip
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trl_templates() -> list[Path]:
    """The chat templates that TRL brings."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    return sorted((Path(spec.submodule_search_locations[0]) / "chat_templates").glob("*.jinja"))


def trl_template(name: str) -> str:
    (path,) = (path for path in trl_templates() if path.stem == name)
    return path.read_text("utf-8")


def train_base(folder: Path) -> Path:
    """A byte-level BPE of 1,500 tokens with everybody's special tokens, as tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_texts(20), trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def make_folder(
    base: Path, folder: Path, template: str | None, bos: str | None, eos: str, add_bos: bool = False
) -> Path:
    """A Hugging Face folder of that tokenizer. `add_bos`: it puts the bos token before plain text."""
    folder.mkdir(parents=True)
    if add_bos:
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        assert bos is not None
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, SPECIAL.index(bos))]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        shutil.copyfile(base / "tokenizer.json", folder / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": "<|endoftext|>"}
    config |= {"clean_up_tokenization_spaces": False} | ({"bos_token": bos} if bos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


WORDS = [
    "the", "quick", "brown", "fox", "don't", "3.14", "def", "return", "None", "", "\n", "\n\n", "caf\u00e9", "日本語",
    "👩\u200d👩\u200d👧", "e\u0301", "x=1;", '{{ "a": [1,2] }}', "<b>", "|>", "<|", "&amp;", "\u200b", "\t", "“quoted”",
    "<think>", "end",
]  # fmt: skip


def conversations(number: int, seed: int = 0, system: bool = True, most_turns: int = 3) -> list[list[dict[str, Any]]]:
    """Random conversations; every answer has some text that is no space."""
    chance = random.Random(seed)

    def text(least: int) -> str:
        return " ".join(["so", *(chance.choice(WORDS) for _ in range(chance.randint(least, 12))), "it ends."])

    result = []
    for _ in range(number):
        messages: list[dict[str, Any]] = []
        if system and chance.random() < 0.3:
            messages.append({"role": "system", "content": text(1)})
        for _ in range(chance.randint(1, most_turns)):
            messages += [{"role": "user", "content": text(0)}, {"role": "assistant", "content": text(0)}]
        result.append(messages)
    return result


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def prepared(folder: Path, tokenizer: Path, records: Sequence[dict[str, Any]], *options: str, kind: str = "sft") -> Any:
    """The store of some records, made in this process."""
    corpus, output = write_records(folder / "records.jsonl", records), folder / "store"
    shutil.rmtree(output, ignore_errors=True)
    base = ["prepare", "--format", kind, "--input", str(corpus), "--tokenizer", str(tokenizer), "--output", str(output)]
    assert main([*base, "--workers", "0", "--quiet", *options]) == 0
    return TokenStore.open(output)


def ids_and_masks(store: TokenStore) -> list[list[tuple[list[int], list[int]]]]:
    """Of each record its texts, each as ids and mask of what is learnt."""
    result = []
    for number in range(store.num_documents):
        start, stop = store.document_start(number), store.document_start(number + 1)
        ids, flags = store.read(start, stop), store.flags(start, stop)
        begins = np.flatnonzero(flags & BEGINS)
        assert begins[0] == 0
        pairs = zip(np.split(ids, begins[1:]), np.split(flags & TRAINED, begins[1:]), strict=True)
        result.append([(own.tolist(), mask.tolist()) for own, mask in pairs])
    return result
