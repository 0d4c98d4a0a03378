"""The same conversation in every format and from every kind of file; and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.data_prep.records.samples import (
    conversations,
    ids_and_masks,
    make_folder,
    prepared,
    trl_template,
    write_records,
)
from zeropipe.data_prep.cli import main
from zeropipe.data_prep.records.formats import recognise
from zeropipe.data_prep.records.settings import BadRecord
from zeropipe.data_prep.store import TokenStore

USER, ANSWER = {"role": "user", "content": "Add\n\n1+1"}, {"role": "assistant", "content": "It is 2."}
SYSTEM = {"role": "system", "content": "Be exact."}
SAME = [
    {"messages": [SYSTEM, USER, ANSWER]},
    {"messages": [{**SYSTEM, "name": None}, USER, {**ANSWER, "tool_calls": None}], "prompt": "Add", "prompt_id": 7},
    {"conversations": [SYSTEM, USER, ANSWER]},
    {
        "conversations": [{"from": "human", "value": "Add\n\n1+1"}, {"from": "gpt", "value": "It is 2."}],
        "system": "Be exact.",
    },
    {"instruction": "Add", "input": "1+1", "output": "It is 2.", "system": "Be exact.", "text": "all of it"},
    {"instruction": "Add\n\n1+1", "input": "", "output": "It is 2.", "system": "Be exact."},
]


def test_every_format_of_a_conversation(chatml: Path, tmp_path: Path) -> None:
    store = prepared(tmp_path, chatml, SAME, kind="auto")
    texts = ids_and_masks(store)
    assert store.records.kind == "sft" and store.eod_id is None
    assert all(text == texts[0] for text in texts)
    assert store.manifest.counts == {"Alpaca": 2, "ShareGPT": 2, "kept": 6, "messages": 2, "read": 6}
    assert store.records.longest == len(texts[0][0][0]) and store.records.stop_ids == [2]


def test_history_comes_before_an_instruction() -> None:
    sample = recognise({"instruction": "b", "output": "B", "history": [["a", "A"]]}, "auto")
    assert [message["content"] for message in sample.answers[0]] == ["a", "A", "b", "B"]


def test_pairs_in_every_shape() -> None:
    chosen, rejected = [USER, ANSWER], [USER, {**ANSWER, "content": "3"}]
    same = [
        {"chosen": chosen, "rejected": rejected},
        {"prompt": USER["content"], "chosen": chosen, "rejected": rejected, "messages": chosen, "score_chosen": 1.0},
        {"prompt": [USER], "chosen": chosen[1:], "rejected": rejected[1:]},
        {"prompt": USER["content"], "chosen": chosen[1:], "rejected": rejected[1:]},
    ]
    samples = [recognise(record, "auto") for record in same]
    assert all((sample.prompt, sample.answers) == ([USER], [chosen[1:], rejected[1:]]) for sample in samples)
    assert recognise(same[1], "sft").answers == [chosen]
    text = recognise({"chosen": "Q: a A: b", "rejected": "Q: a A: c"}, "dpo")
    assert (text.prompt, text.answers) == ("Q: a A:", [" b", " c"])


def test_every_kind_of_file_at_once(chatml: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    chats = conversations(700)
    records = [{"messages": chat, "n": number} for number, chat in enumerate(chats)]
    write_records(tmp_path / "a.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "b.parquet", row_group_size=100)
    Dataset.from_list(records).save_to_disk(tmp_path / "c")
    with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema([])) as _:
        pass
    inputs = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c")]
    command = ["prepare", "--format", "sft", "--tokenizer", str(chatml), "--output", str(tmp_path / "store"), "--quiet"]
    assert main([*command, "--task-size", "20000", "--workers", "0", "--input", *inputs]) == 0
    texts = ids_and_masks(TokenStore.open(tmp_path / "store"))
    assert len(texts) == 2100
    assert texts[:700] == texts[700:1400] == texts[1400:]


def test_keys_that_a_column_only_fills_with_nulls_are_not_there(chatml: Path, base: Path, tmp_path: Path) -> None:
    """Calls with different arguments share one column of objects, in which each has the keys of all."""
    folder = make_folder(base, tmp_path / "tokenizer", trl_template("qwen2_5_training"), None, "<|im_end|>")
    records = []
    for arguments in ({"a": 1}, {"b": "two"}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "2"}, ANSWER]
        tool = {"type": "function", "function": {"name": "f", "parameters": {key: {} for key in arguments}}}
        records.append({"messages": turns, "tools": json.dumps([tool])})
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "calls.parquet")
    expected = ids_and_masks(prepared(tmp_path, folder, records))
    command = ["prepare", "--format", "sft", "--input", str(tmp_path / "calls.parquet"), "--tokenizer", str(folder)]
    assert main([*command, "--output", str(tmp_path / "rows"), "--workers", "0", "--quiet"]) == 0
    assert ids_and_masks(TokenStore.open(tmp_path / "rows")) == expected


def test_tasks_in_which_all_is_bad_leave_nothing(chatml: Path, tmp_path: Path) -> None:
    records = [{"messages": [USER]}] * 50 + [{"messages": [USER, ANSWER]}] * 3
    store = prepared(tmp_path, chatml, records, "--on-error", "skip", "--task-size", "500", "--shuffle", "1")
    assert store.num_documents == 3 and store.manifest.counts["invalid"] == 50


def test_rows_are_numbered_in_the_file(chatml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"messages": [USER, ANSWER]} for _ in range(500)]
    records[437] = {"messages": [USER, {**ANSWER, "content": " "}]}
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "b.parquet", row_group_size=100)
    write_records(tmp_path / "a.jsonl", records)
    command = ["prepare", "--format", "sft", "--tokenizer", str(chatml), "--output", str(tmp_path / "store"), "--quiet"]
    for name, place in (("b.parquet", "b.parquet: row 438:"), ("a.jsonl", "a.jsonl, line 438:")):
        arguments = ["--task-size", "500", "--workers", "0", "--overwrite", "--input", str(tmp_path / name)]
        assert main([*command, *arguments]) == 2
        assert f"{place} messages[1]: the assistant's turn is empty" in capsys.readouterr().err
    assert (
        main([*command, "--input", str(tmp_path / "b.parquet"), "--on-error", "skip", "--workers", "0", "--overwrite"])
        == 0
    )
    assert "1 invalid documents were passed over, such as" in capsys.readouterr().err
    store = TokenStore.open(tmp_path / "store")
    assert store.num_documents == 499 and store.manifest is not None and store.manifest.counts["invalid"] == 1


TURNS = {"messages": [USER, ANSWER]}
BAD: list[tuple[Any, str]] = [
    (
        {"title": "t", "body": {"a": 1}},
        r"of no known format: the keys there are: 'title', 'body.a'; expected: messages",
    ),
    ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\]: unknown role 'robot'; known are system, user"),
    ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role; the keys there are: 'content'"),
    (
        {"messages": [ANSWER, USER]},
        r"messages\[0\]: roles out of order: 'assistant' at the beginning, expected 'system'",
    ),
    (
        {"messages": [USER, USER, ANSWER]},
        r"messages\[1\]: roles out of order: 'user' after 'user', expected 'assistant'",
    ),
    ({"messages": [USER, SYSTEM, ANSWER]}, r"messages\[1\]: roles out of order: 'system' after 'user'"),
    ({"messages": [USER, {"role": "assistant", "content": "\n"}]}, r"messages\[1\]: the assistant's turn is empty"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\]: its content is null, a string was"),
    ({"messages": [USER]}, r"messages: no assistant turn"),
    ({"messages": []}, r"'messages' holds no message"),
    ({"messages": "x"}, r"the value of 'messages' is a string, a list of messages was expected"),
    ({"messages": ["x"]}, r"messages\[0\] is a string, a message with role and content was expected"),
    ({"messages": [{"role": "user", "content": 7}, ANSWER]}, r"messages\[0\]: its content is a number, a string was"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
        r"messages\[0\]: only text can be learnt",
    ),
    (TURNS | {"tools": "{"}, r"'tools' is a string that is not JSON"),
    (TURNS | {"tools": [1]}, r"'tools' must be a list of JSON schemas"),
    (TURNS | {"chat_template_kwargs": {"messages": []}}, r"'chat_template_kwargs' must be an object that names none"),
    ({"text": ""}, r"the value of 'text' is empty"),
    ({"text": ["x"]}, r"the value of 'text' is a list, a string was expected"),
    ({"prompt": "x", "completion": [ANSWER]}, r"the value of 'completion' is a list, a string was expected"),
    ({"prompt": "x", "completion": ""}, r"the value of 'completion' is empty"),
    ({"prompt": [USER], "completion": [USER]}, r"'completion' begins with the role 'user', an assistant turn was"),
    ({"prompt": [USER, ANSWER], "completion": [ANSWER]}, r"prompt \+ completion\[2\]: roles out of order"),
    ({"instruction": "x", "output": 3}, r"the value of 'output' is a number, a string was expected"),
    ({"instruction": "x", "output": ""}, r"the assistant's turn is empty"),
    ({"instruction": "x", "output": "y", "history": ["z"]}, r"'history' must hold pairs"),
    ({"chosen": "x", "rejected": "x"}, r"chosen and rejected are equal"),
    ({"chosen": "x", "rejected": "y"}, r"share no beginning that could be the prompt"),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "name": None}]}, r"chosen and rejected are equal"),
    ({"prompt": [USER], "chosen": "x", "rejected": "y"}, r"'prompt' is a list, but 'chosen' is a string"),
    (
        {"prompt": "other", "chosen": [USER, ANSWER], "rejected": [USER, SYSTEM]},
        r"'prompt' is text that is no turn of both",
    ),
    ({"prompt": "x", "chosen": [ANSWER], "rejected": "y"}, r"the value of 'chosen' is a list, a string was expected"),
    ({"prompt": "x", "chosen": "y"}, r"of no known format: the keys there are: 'prompt', 'chosen'"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_what_is_no_record(record: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        recognise(record, "auto")


def test_a_record_of_the_other_kind() -> None:
    with pytest.raises(
        BadRecord, match=r"the keys there are: 'messages'; expected: chosen \+ rejected, with or without"
    ):
        recognise(TURNS, "dpo")
    with pytest.raises(
        BadRecord, match=r"the keys there are: 'chosen', 'rejected'; expected: messages \| conversations"
    ):
        recognise({"chosen": "ab", "rejected": "ac"}, "sft")


def test_bad_records_are_counted_or_end_it(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them in one file, and what only the template or the length tells; the good ones come out."""
    template = (
        "{% for m in messages %}{% if m.content == 'boom' %}{{ raise_exception('not this') }}{% endif %}"
        "{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    folder = make_folder(base, tmp_path / "tokenizer", template, None, "<|im_end|>")
    boom = {"messages": [{"role": "user", "content": "boom"}, ANSWER]}
    long = {"messages": [{"role": "user", "content": "a b c d e f g h" * 10}, ANSWER]}
    lines = [json.dumps(record) for record, _ in BAD if "chosen" not in record or "completion" in record]
    bad = [*lines, "[1]", "{", json.dumps(boom), '{"text": "\\ud800"}']
    corpus = tmp_path / "records.jsonl"
    corpus.write_text("\n".join([json.dumps(TURNS), *bad, json.dumps(long), json.dumps(TURNS)]) + "\n")
    command = ["prepare", "--format", "sft", "--input", str(corpus), "--tokenizer", str(folder), "--workers", "0"]
    command += ["--output", str(tmp_path / "store"), "--quiet", "--seq-len", "40", "--excess", "truncate"]
    assert main(command) == 2
    assert "records.jsonl, line 2: of no known format" in capsys.readouterr().err
    assert main([*command, "--on-error", "skip"]) == 0
    store = TokenStore.open(tmp_path / "store")
    assert store.manifest is not None and store.num_documents == 2
    assert store.manifest.counts["invalid"] == len(bad) + 1
    for record, message in (
        (boom, "the chat template fails on it: not this"),
        (long, "no token of it would be learnt"),
    ):
        corpus.write_text(json.dumps(TURNS) + "\n" + json.dumps(record) + "\n")
        assert main([*command, "--overwrite"]) == 2
        error = capsys.readouterr().err
        assert f"records.jsonl, line 2: {message}" in error and "--on-error skip" in error
