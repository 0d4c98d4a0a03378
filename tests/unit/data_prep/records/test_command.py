"""`zeropipe prepare --format sft|dpo|auto`, `inspect`, `verify` and `merge` of what it makes."""

from __future__ import annotations

import filecmp
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data_prep.records.samples import (
    CHATML,
    conversations,
    ids_and_masks,
    make_folder,
    prepared,
    trl_template,
    write_records,
)
from tests.unit.data_prep.test_kills import run_with_a_kill
from zeropipe.data_prep.cli import main
from zeropipe.data_prep.manifest import Manifest, file_record
from zeropipe.data_prep.store import TokenStore

COMMAND = [sys.executable, "-m", "zeropipe.data_prep.cli", "prepare", "--format", "auto", "--quiet"]


def preferences(number: int) -> list[dict[str, Any]]:
    chats = conversations(number)
    return [
        {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [{**chat[-1], "content": f"no {place}"}]}
        for place, chat in enumerate(chats)
    ]


def same_files(one: Path, other: Path) -> bool:
    names = [str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()]
    return filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("kind", [pytest.param("sft", marks=pytest.mark.slow), "dpo"])
def test_workers_and_kills_change_no_byte(kind: str, chatml: Path, tmp_path: Path) -> None:
    records = preferences(400) if kind == "dpo" else [{"messages": chat} for chat in conversations(1500)]
    corpus = write_records(tmp_path / "records.jsonl", records + records[:40])
    options = ["--input", str(corpus), "--tokenizer", str(chatml), "--task-size", "30000", "--shard-size", "20000"]
    options += ["--deduplicate", "--shuffle", "5", "--seq-len", "300"]

    def command(name: str, workers: int) -> list[str]:
        return [*COMMAND, *options, "--output", str(tmp_path / name), "--workers", str(workers)]

    for workers in (0, 2):
        started = time.monotonic()
        subprocess.run(command(f"workers{workers}", workers), check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert same_files(tmp_path / "workers0", tmp_path / "workers2")
    duration, chance, hits, stores = time.monotonic() - started, random.Random(1), 0, [tmp_path / "killed0"]
    while hits < 2:
        after = duration * chance.uniform(0.2, 1.0)
        hits += (hit := run_with_a_kill(command(stores[-1].name, 2), after, chance.choice(["parent", "worker"])))
        duration *= 1.05 if hit else 0.8
        if stores[-1].exists():
            stores.append(tmp_path / f"killed{len(stores)}")
    subprocess.run(command(stores[-1].name, 2), check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert all(same_files(tmp_path / "workers0", store) for store in stores)
    store = TokenStore.open(stores[-1])
    assert store.manifest is not None and store.manifest.counts["duplicates"] >= 20 and len(store.shards) > 2
    assert store.records is not None and store.records.longest == int(store.document_lengths().max()) <= 300


def test_another_template_is_another_job(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unfinished work with one template, or one generation_config.json, is no use to another."""
    folder = make_folder(base, tmp_path / "tokenizer", CHATML, None, "<|im_end|>")
    corpus = write_records(tmp_path / "records.jsonl", [{"messages": chat} for chat in conversations(50)])
    command = ["prepare", "--format", "sft", "--input", str(corpus), "--tokenizer", str(folder), "--workers", "0"]
    command += ["--output", str(tmp_path / "store"), "--quiet", "--task-size", "2000"]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("zeropipe.data_prep.making.prepare._complete_store", stop)
        with pytest.raises(KeyboardInterrupt):
            main(command)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert main(command) == 2
    assert (
        "unfinished work of another command lies here (differs in: generation_config.json)" in capsys.readouterr().err
    )
    (folder / "generation_config.json").unlink()
    (folder / "chat_template.jinja").write_text(CHATML + " ")
    assert main(command) == 2
    assert "(differs in: chat_template.jinja)" in capsys.readouterr().err
    assert main([*command, "--train-on", "all"]) == 2
    assert "differs in: chat_template.jinja, records" in capsys.readouterr().err


@pytest.mark.parametrize("excess", ["drop", "truncate", "error"])
def test_records_that_are_too_long(
    excess: str, chatml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = 120
    whole = ids_and_masks(prepared(tmp_path, chatml, preferences(40), kind="dpo"))
    sizes = [[len(ids) for ids, _ in texts] for texts in whole]
    assert any(sum(size) > limit for size in sizes) and any(sum(size) <= limit for size in sizes)
    options = ["--seq-len", str(limit), "--excess", excess]
    if excess == "error":
        command = ["prepare", "--format", "dpo", "--input", str(tmp_path / "records.jsonl"), "--workers", "0", *options]
        assert main([*command, "--tokenizer", str(chatml), "--output", str(tmp_path / "other"), "--quiet"]) == 2
        first = next(number for number, size in enumerate(sizes) if sum(size) > limit)
        assert f"line {first + 1}: too long: it has {sum(sizes[first])} tokens, more than" in capsys.readouterr().err
        return
    skip = ["--on-error", "skip"]  # a text of which nothing would be learnt when it is cut
    store = prepared(tmp_path, chatml, preferences(40), *options, *skip, kind="dpo")
    told = capsys.readouterr().err
    expected = []
    for texts, (one, other) in zip(whole, sizes, strict=True):
        if one + other > limit and excess == "drop":
            continue
        lengths = (one, other)
        while sum(lengths) > limit:  # the longer one gives way
            lengths = (lengths[0] - 1, lengths[1]) if lengths[0] >= lengths[1] else (lengths[0], lengths[1] - 1)
        cut = [(ids[:size], mask[:size]) for (ids, mask), size in zip(texts, lengths, strict=True)]
        if all(any(mask[1:]) for _, mask in cut):
            expected.append(cut)
    made = ids_and_masks(store)
    assert len(made) == len(expected)
    assert [sum(len(ids) for ids, _ in texts) for texts in made] == [sum(len(ids) for ids, _ in t) for t in expected]
    name = "longer than --seq-len" if excess == "drop" else "cut to --seq-len"
    number = sum(sum(size) > limit for size in sizes)
    assert store.manifest.counts[name] == number and f"{number} records were" in told and name in told
    if excess == "drop":
        assert made == expected


def test_the_stop_token_must_be_learnt(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_records(tmp_path / "records.jsonl", [{"messages": conversations(1)[0]}])
    command = ["prepare", "--format", "sft", "--input", str(corpus), "--workers", "0", "--quiet", "--output"]
    command += [str(tmp_path / "store"), "--tokenizer"]
    wrong = make_folder(base, tmp_path / "wrong", CHATML, None, "<|endoftext|>")
    assert main([*command, str(wrong)]) == 2
    error = capsys.readouterr().err
    assert "the chat template ends an answer with '<|im_end|>', but generation stops at '<|endoftext|>'" in error
    assert "name '<|im_end|>' as eos_token_id in generation_config.json" in error
    (wrong / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert main([*command, str(wrong)]) == 0
    assert TokenStore.open(tmp_path / "store").records.stop_ids == [2]  # type: ignore[union-attr]
    bare = make_folder(base, tmp_path / "bare", CHATML.replace("<|im_end|>", ""), None, "<|im_end|>")
    assert main([*command, str(bare), "--overwrite"]) == 2
    assert "ends an answer with no special token, but generation stops at '<|im_end|>'" in capsys.readouterr().err


def test_options_that_make_no_sense(
    chatml: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_records(tmp_path / "records.jsonl", [{"messages": conversations(1)[0]}])
    (tmp_path / "text.txt").write_text("text")
    pairs = write_records(tmp_path / "pairs.jsonl", preferences(2))
    untemplated = make_folder(base, tmp_path / "untemplated", None, None, "<|im_end|>")
    endless = make_folder(base, tmp_path / "endless", CHATML, None, "<|no|>")
    marked = make_folder(base, tmp_path / "marked", trl_template("qwen2_5_training"), None, "<|im_end|>")
    tokenizer, given = ["--tokenizer", str(chatml)], ["--input", str(corpus)]
    sft = ["--format", "sft", *given]
    cases: list[tuple[list[str], str]] = [
        (
            [*given, *tokenizer, "--seq-len", "8"],
            "--seq-len: for records: say what they are with --format sft, dpo or auto",
        ),
        (
            [*given, *tokenizer, "--format", "jsonl", "--train-on-inputs", "--excess", "drop"],
            "--train-on-inputs, --excess: for",
        ),
        ([*sft, *tokenizer, "--excess", "drop"], "--excess drop: for records longer than what? give --seq-len"),
        (
            [*sft, *tokenizer, "--train-on", "assistant", "--train-on-inputs"],
            "--train-on-inputs is --train-on all, but",
        ),
        ([*sft, *tokenizer, "--text-unit", "line"], "--text-key and --text-unit are for text"),
        ([*sft, *tokenizer, "--text-key", "body"], "--text-key and --text-unit are for text"),
        ([*sft, *tokenizer, "--eod-token", "<s>"], "--eod-token: records (--format sft) end as"),
        ([*sft, "--train-tokenizer", "300"], "needs the model's own tokenizer: give --tokenizer"),
        ([*tokenizer, "--format", "auto", "--builtin", "stdlib"], "--builtin is text"),
        (
            [*tokenizer, "--format", "auto", "--import", "x"],
            "--import takes token files, in which there are no records",
        ),
        ([*sft, *tokenizer, "--chat-template", "no.jinja"], "no.jinja: no such file: --chat-template takes a jinja2"),
        ([*sft, *tokenizer, "--template-date", "2026-01-01"], "--template-date: the chat template does not ask for"),
        ([*sft, "--tokenizer", str(untemplated)], "the tokenizer has no chat template: give one with --chat-template"),
        ([*sft, "--tokenizer", str(endless)], "names the eos_token '<|no|>', which the tokenizer lacks"),
        (
            [*sft, "--tokenizer", str(marked), "--train-trailing"],
            "the chat template says itself, with {% generation %}",
        ),
        (
            ["--format", "auto", "--input", str(pairs), *tokenizer, "--train-on", "all"],
            "--train-on all: of preference pairs",
        ),
        (
            ["--format", "sft", "--input", str(tmp_path / "text.txt"), *tokenizer],
            "text.txt: read as text, which holds no",
        ),
        ([*sft, *tokenizer, "--seq-len", "0"], "must be more than 0"),
        ([*sft, *tokenizer, "--template-date", "1.1.26"], "not a date; write it like 2026-01-31"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in cases:
        assert main(["prepare", *arguments, "--output", str(tmp_path / "store"), "--quiet", "--workers", "0"]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, (arguments, error)
    assert sorted(tmp_path.rglob("*")) == before


def test_plain_text_needs_no_template(base: Path, tmp_path: Path) -> None:
    folder = make_folder(base, tmp_path / "tokenizer", None, None, "<|im_end|>")
    store = prepared(tmp_path, folder, [{"text": "so it is"}, {"prompt": "a", "completion": " b"}], kind="auto")
    assert store.records.stop_ids == [2] and store.records.settings["chat_template"] is None


def test_inspect_shows_what_is_learnt(chatml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    store = prepared(tmp_path, chatml, [{"messages": chat}])
    capsys.readouterr()
    assert main(["inspect", str(store.path)]) == 0
    shown = capsys.readouterr().out
    assert "records of sft: one text a record; the longest has" in shown
    assert "stop tokens that are learnt: '<|im_end|>' (2)" in shown
    assert "<|im_start|>assistant\n⟦Hello there<|im_end|>⟧\n" in shown
    pair = {"prompt": chat[:1], "chosen": chat[1:], "rejected": [{"role": "assistant", "content": "No"}]}
    store = prepared(tmp_path, chatml, [pair], kind="dpo")
    capsys.readouterr()
    assert main(["inspect", str(store.path), "--document", "0", "--tokens", "3"]) == 0
    shown = capsys.readouterr().out
    assert "record 0\nchosen: " in shown and "\nrejected: " in shown and "learnt, the first 3" in shown


def test_inspect_lights_up_on_a_terminal(chatml: Path, tmp_path: Path) -> None:
    import pty

    store = prepared(tmp_path, chatml, [{"messages": conversations(1)[0]}])
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "zeropipe.data_prep.cli", "inspect", str(store.path)]
    subprocess.run(command, stdout=theirs, check=True, timeout=60)
    shown = os.read(ours, 1 << 16).decode("utf-8", "replace")
    assert "\033[30;42mso" in shown and "⟦" not in shown


def damaged(store: Path, number: int, flag: int) -> None:
    """Changes one flag, and the manifest so that only the flags' meaning is wrong."""
    flags = bytearray((store / "shard-00000.mask").read_bytes())
    flags[number] = flag
    (store / "shard-00000.mask").write_bytes(flags)
    content = json.loads((store / "manifest.json").read_text())
    record = file_record(store / "shard-00000.mask")
    content["shards"][0]["mask"] = {"bytes": record.bytes, "sha256": record.sha256}
    manifest = Manifest._from_payload(
        {k: v for k, v in content.items() if k not in ("format", "version", "fingerprint")}
    )
    manifest.save(store)


def test_verify_reads_the_flags(chatml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = prepared(tmp_path, chatml, preferences(5), kind="dpo").path
    assert main(["verify", str(whole)]) == 0
    store = TokenStore.open(whole)
    starts = [store.document_start(number) for number in range(5)]
    flags = store.flags(0, store.num_tokens)
    learnt = np.flatnonzero(flags[starts[2] : starts[3]] & 1)
    cases = [
        (starts[3] + 1, 8, "record 3 holds flags that are not known"),
        (starts[3], 0, "record 3 does not begin with the first token of a text"),
        (starts[1] + 1, 2, "record 1 does not hold 2 texts, as dpo does"),
    ]
    assert len(learnt) > 1
    for place, flag, message in cases:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "copy")
        damaged(tmp_path / "copy", place, flag)
        capsys.readouterr()
        assert main(["verify", str(tmp_path / "copy")]) == 2
        assert f"shard-00000.mask: {message}" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "copy")
    shutil.copytree(whole, tmp_path / "copy")
    for place in learnt:
        damaged(tmp_path / "copy", starts[2] + int(place), 0)
    assert main(["verify", str(tmp_path / "copy")]) == 2
    assert "record 2 has a text of which nothing is learnt" in capsys.readouterr().err
    data = bytearray((whole / "shard-00000.mask").read_bytes())
    data[5] ^= 1
    (whole / "shard-00000.mask").write_bytes(data)
    assert main(["verify", str(whole)]) == 2
    assert "shard-00000.mask: " in capsys.readouterr().err


def test_merge_of_records(chatml: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = [{"messages": chat} for chat in conversations(30)]
    made = {}
    for name, records, kind in (("a", chats[:20], "sft"), ("b", chats[20:], "sft"), ("d", preferences(5), "dpo")):
        (tmp_path / name).mkdir()
        made[name] = prepared(tmp_path / name, chatml, records, kind=kind)
    merged = tmp_path / "merged"
    assert main(["merge", str(made["a"].path), str(made["b"].path), "--output", str(merged)]) == 0
    store = TokenStore.open(merged)
    assert ids_and_masks(store) == ids_and_masks(made["a"]) + ids_and_masks(made["b"])
    assert store.records is not None and store.records.longest == max(made[n].records.longest for n in "ab")
    assert main(["verify", str(merged)]) == 0
    capsys.readouterr()
    assert main(["merge", str(made["a"].path), str(made["d"].path), "--output", str(tmp_path / "no")]) == 2
    assert "cannot be merged" in (error := capsys.readouterr().err) and "it holds dpo, not sft" in error
    other = make_folder(base, tmp_path / "other", trl_template("qwen2_5_training"), None, "<|im_end|>")
    (tmp_path / "e").mkdir()
    unlike = prepared(tmp_path / "e", other, chats)
    assert main(["merge", str(made["a"].path), str(unlike.path), "--output", str(tmp_path / "no")]) == 2
    assert "it was made with another chat template" in capsys.readouterr().err


def test_the_longest_record_is_of_those_kept(chatml: Path, tmp_path: Path) -> None:
    chats = sorted(conversations(20), key=lambda chat: sum(len(message["content"]) for message in chat))
    for options in ([], ["--shuffle", "1"]):
        store = prepared(tmp_path, chatml, [{"messages": chat} for chat in chats], "--limit-documents", "3", *options)
        assert store.records.longest == int(store.document_lengths().max())
