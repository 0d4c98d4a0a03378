"""Ids and masks against transformers, with the chat templates of real families as TRL brings them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.unit.data_prep.records.samples import (
    FAMILIES,
    SPECIAL,
    conversations,
    ids_and_masks,
    make_folder,
    prepared,
    trl_template,
    trl_templates,
    write_records,
)
from zeropipe.data_prep.cli import main
from zeropipe.data_prep.making.encoding import EncodersDiffer
from zeropipe.data_prep.records.conversation import conversation
from zeropipe.data_prep.records.settings import BadRecord
from zeropipe.data_prep.records.template import ChatTemplate, template_sources

ROLES_ALTERNATE = ("gemma",)  # families without a system turn
# without markers an answer is found by comparison: these write earlier answers otherwise once more follows
LAST_ONLY = {"qwen3", "gptoss"}
# and these cannot be told at all
REFUSED = {
    "deepseekv3": "another way when more follows",  # invites an answer with <think>, which the answer then lacks
    "glm4moe": "ends an answer with no special token, but generation stops at '<|user|>'",
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}]


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("encoder", ["gigatoken", "tokenizers", "offsets"])
def test_marked_templates_give_what_transformers_gives(
    family: str, encoder: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if encoder != "gigatoken":

        def refuse(*_: object) -> None:
            raise EncodersDiffer("not today")

        monkeypatch.setattr("zeropipe.data_prep.records.spans.FastSpans.__init__", refuse)
    if encoder == "offsets":  # of a tokenizer whose tokens do not say how long they are
        monkeypatch.setattr("zeropipe.data_prep.records.spans._byte_lengths", lambda _: None)
    folder = make_folder(base, tmp_path / "tokenizer", trl_template(f"{family}_training"), *FAMILIES[family])
    chats = conversations(40, system=family not in ROLES_ALTERNATE)
    chats[0][-1]["content"] += " " + SPECIAL[2] + " written by the user"
    store = prepared(tmp_path, folder, [{"messages": chat} for chat in chats])
    reference = tokenizer_of(folder)
    for chat, ((ids, mask),) in zip(chats, ids_and_masks(store), strict=True):
        expected = reference.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert (ids, mask) == (expected["input_ids"], expected["assistant_masks"])
        assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_templates_without_markers_give_the_turns_between_prompts(family: str, base: Path, tmp_path: Path) -> None:
    """The reference: every token of what transformers renders that overlaps an answer, to its last special token."""
    bos, eos = FAMILIES[family]
    folder = make_folder(base, tmp_path / "tokenizer", trl_template(family), bos, eos)
    turns = 1 if family in LAST_ONLY else 3
    chats = conversations(30, system=family not in ROLES_ALTERNATE, most_turns=turns)
    store = prepared(tmp_path, folder, [{"messages": chat} for chat in chats])
    tight = ids_and_masks(store)
    loose = ids_and_masks(prepared(tmp_path, folder, [{"messages": chat} for chat in chats], "--train-trailing"))
    reference = tokenizer_of(folder)

    def rendered(messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return reference.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)

    for chat, ((ids, mask),), ((_, wide),) in zip(chats, tight, loose, strict=True):
        text = rendered(chat)
        encoded = reference(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ids == encoded["input_ids"] == reference.apply_chat_template(chat)["input_ids"]
        spans = []
        for turn in (place for place, message in enumerate(chat) if message["role"] == "assistant"):
            after = rendered(chat[: turn + 1])
            after = after if text.startswith(after) else after.removesuffix(eos)  # phi3 ends each text with it
            spans.append((len(rendered(chat[:turn], prompt=True)), len(after)))
        inside = [[start < b and a < stop for a, b in encoded["offset_mapping"]] for start, stop in spans]
        assert wide == [int(any(column)) for column in zip(*inside, strict=True)]
        expected = [0] * len(ids)
        for column in inside:
            special = [place for place, own in enumerate(column) if own and reference.decode(ids[place]) in SPECIAL]
            for place in range(column.index(True), special[-1] + 1):
                expected[place] = 1
        assert mask == expected


@pytest.mark.parametrize("family", REFUSED)
def test_templates_without_markers_that_tell_nothing(
    family: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(base, tmp_path / "tokenizer", trl_template(family), *FAMILIES[family])
    corpus = write_records(tmp_path / "records.jsonl", [{"messages": conversations(1)[0]}])
    command = ["prepare", "--format", "auto", "--input", str(corpus), "--tokenizer", str(folder), "--workers", "0"]
    assert main([*command, "--output", str(tmp_path / "store")]) == 2
    assert REFUSED[family] in capsys.readouterr().err


def test_an_earlier_answer_that_is_rewritten_is_an_error(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(base, tmp_path / "tokenizer", trl_template("qwen3"), *FAMILIES["qwen3"])
    chat = conversations(1)[0][-2:] * 2
    corpus = write_records(tmp_path / "records.jsonl", [{"messages": chat}])
    command = ["prepare", "--format", "sft", "--input", str(corpus), "--tokenizer", str(folder), "--workers", "0"]
    assert main([*command, "--output", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err
    assert "records.jsonl, line 1: the chat template writes" in error and "--train-on last_assistant" in error
    assert main([*command, "--output", str(tmp_path / "store"), "--train-on", "last_assistant", "--quiet"]) == 0


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "lfm2_v2"])
@pytest.mark.parametrize("variant", ["", "_training"])
def test_tools_and_calls(family: str, variant: str, base: Path, tmp_path: Path) -> None:
    folder = make_folder(base, tmp_path / "tokenizer", trl_template(family + variant), "<s>", "<|im_end|>")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "zwei"}}}
    chat = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "assistant", "content": "It is 2.", "reasoning": "easy"},
    ]
    option = () if variant else ("--train-on", "last_assistant")
    store = prepared(tmp_path, folder, [{"messages": chat, "tools": TOOLS}], *option)
    (((ids, mask),),) = ids_and_masks(store)
    expected = tokenizer_of(folder).apply_chat_template(
        chat, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=bool(variant)
    )
    assert ids == expected["input_ids"] and sum(mask)
    if variant:
        assert mask == expected["assistant_masks"]


def test_what_is_trained_on(base: Path, tmp_path: Path) -> None:
    chats = [{"messages": chat} for chat in conversations(20)]
    for template in ("llama3", "llama3_training", "phi3_training"):
        family = template.removesuffix("_training")
        folder = make_folder(base, tmp_path / template, trl_template(template), *FAMILIES[family])
        every = ids_and_masks(prepared(tmp_path, folder, chats))
        last = ids_and_masks(prepared(tmp_path, folder, chats, "--train-on", "last_assistant"))
        whole = ids_and_masks(prepared(tmp_path, folder, chats, "--train-on-inputs"))
        for ((ids, mask),), ((same, tail),), ((again, ones),) in zip(every, last, whole, strict=True):
            assert ids == same == again and ones == [1] * len(ids)
            start = len(mask) - mask[::-1].index(1)
            begin = max((place for place in range(start) if not mask[place]), default=-1) + 1
            assert tail == [int(begin <= place < start) for place in range(len(mask))]


def test_the_templates_that_the_tokenizer_names(base: Path, tmp_path: Path) -> None:
    """A template in tokenizer_config.json, one of its own for tools, and one given by the user, which wins."""
    import json

    folder = make_folder(base, tmp_path / "tokenizer", None, None, "<|im_end|>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    plain, tools = trl_template("qwen2_5_training"), "{{ tools | length }}" + trl_template("qwen3_training")
    config["chat_template"] = [{"name": "default", "template": plain}, {"name": "tool_use", "template": tools}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    records: list[dict[str, Any]] = [{"messages": chat} for chat in conversations(4)]
    records[1]["tools"] = json.dumps(TOOLS)
    store = prepared(tmp_path, folder, records)
    reference = tokenizer_of(folder)
    for record, ((ids, mask),) in zip(records, ids_and_masks(store), strict=True):
        expected = reference.apply_chat_template(
            record["messages"],
            tools=TOOLS if "tools" in record else None,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert (ids, mask) == (expected["input_ids"], expected["assistant_masks"])
    given = tmp_path / "mine.jinja"
    given.write_text(trl_template("llama3_training").replace("<|eot_id|>", "<|im_end|>"))
    store = prepared(tmp_path, folder, records, "--chat-template", str(given))
    assert store.tokenizer is not None and template_sources(store.tokenizer) == {"default": given.read_text()}
    expected = tokenizer_of(store.tokenizer).apply_chat_template(records[0]["messages"], return_dict=True)
    assert ids_and_masks(store)[0][0][0] == expected["input_ids"]


def test_a_template_that_asks_for_the_date_gets_one_day(base: Path, tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y') }}" + trl_template("llama3_training")
    folder = make_folder(base, tmp_path / "tokenizer", template, *FAMILIES["llama3"])
    store = prepared(tmp_path, folder, [{"messages": conversations(1)[0]}], "--template-date", "2026-02-03")
    decoded = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids_and_masks(store)[0][0][0])
    assert decoded.startswith("03 Feb 2026") and store.records.settings["date"] == "2026-02-03"


def test_every_template_of_trl_renders_as_transformers_renders_it() -> None:
    """Text and marked spans of all of them, tools, calls, parts and reasoning included; both fail on the same."""
    import datetime

    from transformers.utils.chat_template_utils import render_jinja_template

    call = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}
    calls = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call], "thinking": "hm"},
        {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "2"},
        {"role": "assistant", "content": "It is 2.", "reasoning_content": "easy"},
    ]
    parts = [{"role": role, "content": [{"type": "text", "text": "hey"}]} for role in ("user", "assistant")]
    chats = [(chat, None) for chat in conversations(4)] + [(calls, TOOLS), (parts, None)]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered = 0
    for path in trl_templates():
        source = path.read_text("utf-8")
        template = ChatTemplate({"default": source}, tokens, datetime.date.today().isoformat())
        for chat, tools in chats:
            try:
                texts, spans = render_jinja_template(
                    [chat], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **tokens
                )
            except Exception:
                with pytest.raises(BadRecord):
                    template.render_marked(conversation(chat, "messages"), tools, {})
                continue
            assert template.render_marked(conversation(chat, "messages"), tools, {}) == (texts[0], spans[0]), path.name
            rendered += 1
    assert rendered > 250
