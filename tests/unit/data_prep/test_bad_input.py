"""What users get wrong: exit code 2, one line on stderr that says what to do, and nothing half-written left behind."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data_prep.samples import random_documents, stdlib_texts, write_jsonl, write_prefix
from zeropipe.data_prep.cli import byte_count, main
from zeropipe.data_prep.store import TokenStore

COMMAND = [sys.executable, "-m", "zeropipe.data_prep.cli"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command fails with; checks that it left nothing."""
    before = sorted(Path().rglob("*"))
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert sorted(Path().rglob("*")) == before
    return lines[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_lines_of_a_corpus(folder: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], workers: int) -> None:
    good = json.dumps({"text": "fine"})
    cases = {
        '{"text": ': "bad.jsonl, line 3: invalid JSON",
        '{"title": "t", "body": "b"}': "line 3: no text at the key 'text'; the keys there are: 'title', 'body'",
    }
    prepare = ("prepare", "--tokenizer", tokenizer, "--output", "store", "--quiet", "--workers", workers)
    for line, message in cases.items():
        Path("bad.jsonl").write_text(f"{good}\n{good}\n{line}\n{good}\n")
        error = refused(capsys, *prepare, "--input", "bad.jsonl")
        assert message in error and "--on-error skip" in error
    assert main([str(word) for word in (*prepare, "--input", "bad.jsonl", "--on-error", "skip")]) == 0
    assert "1 invalid documents were passed over, such as bad.jsonl, line 3: no text" in capsys.readouterr().err
    store = TokenStore.open("store")
    assert store.manifest is not None and store.manifest.counts == {"invalid": 1, "kept": 3, "read": 3}
    Path("latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt: invalid UTF-8 at byte 3" in refused(
        capsys, *prepare[:-5], "--output", "x", "--input", "latin.txt"
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--task-size", "0", "must be more than 0"),
        ("--shard-size", "4 potatoes", "not a size; write it like 500, 64M or 4Gi"),
        ("--workers", "-1", "expected one argument|not a whole number"),
        ("--limit-documents", "few", "not a whole number from 0 on"),
    ],
)
def test_numbers_that_make_no_sense(capsys: pytest.CaptureFixture[str], option: str, value: str, message: str) -> None:
    assert main(["prepare", "--builtin", "stdlib", "--output", "store", option, value]) == 2
    assert re.search(f"error: argument {option}: .*({message})", capsys.readouterr().err)


def test_sizes_are_written_as_people_write_them() -> None:
    assert [byte_count(text) for text in ("500", "64M", "4Gi", "1.5k", "2 TB")] == [
        500,
        64 * 10**6,
        2**32,
        1500,
        2 * 10**12,
    ]


def test_inputs_that_are_not_there(folder: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.jsonl").write_text("")
    Path("blank.jsonl").write_text('\n\n{"text": ""}\n')
    Path("folder").mkdir()
    for name, message in {
        "missing.jsonl": "missing.jsonl: no such file or folder",
        "*.parquet": "*.parquet: no file matches this pattern",
        "folder": "folder: the folder holds no file",
        "empty.jsonl": "empty.jsonl: no document to keep: the corpus is empty (nothing was read)",
        "blank.jsonl": "blank.jsonl: no document to keep: the corpus is empty (1 empty, 1 read)",
    }.items():
        arguments = (
            "prepare",
            "--input",
            name,
            "--tokenizer",
            tokenizer,
            "--quiet",
            "--output",
            "store",
        )
        assert message in refused(capsys, *arguments)


def test_tokenizers_that_are_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(Path("corpus.jsonl"), ["text"])
    Path("nothing").mkdir()
    Path("broken").mkdir()
    Path("broken/tokenizer.json").write_text("{}")
    Path("endless").mkdir()
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, "a")).save("endless/tokenizer.json")
    for name, message in {
        "missing": "missing: no such tokenizer",
        "nothing": "nothing: holds neither tokenizer.json nor vocab.json with merges.txt",
        "broken": "tokenizer.json: not a tokenizer that Hugging Face tokenizers can read",
        "endless": "has neither '<|endoftext|>' nor an eos token; name its end-of-document token with --eod-token",
        "corpus.jsonl": "corpus.jsonl: not a tokenizer",
    }.items():
        error = refused(
            capsys, "prepare", "--input", "corpus.jsonl", "--tokenizer", name, "--output", "store", "--quiet"
        )
        assert message in error and ".making" not in error
    base = ("prepare", "--input", "corpus.jsonl", "--output", "store", "--quiet")
    assert "give either --tokenizer FOLDER or --train-tokenizer N" in refused(capsys, *base)
    assert "needs 257 or more" in refused(capsys, *base, "--train-tokenizer", 100)
    assert "--keep-regex '(': not a valid" in refused(capsys, *base, "--train-tokenizer", 300, "--keep-regex", "(")


def test_a_place_that_cannot_be_written(folder: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(Path("corpus.jsonl"), ["text"])
    Path("file").write_text("in the way")
    prepare = ("prepare", "--input", "corpus.jsonl", "--tokenizer", tokenizer, "--workers", 0, "--quiet", "--output")
    assert "file/store: cannot write there" in refused(capsys, *prepare, "file/store")
    assert "cannot write there" in refused(capsys, *prepare, "/proc/store")  # refuses even root


def test_two_at_once(folder: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(Path("corpus.jsonl"), ["text"])
    Path(".store.preparing").mkdir()
    with open(".store.preparing/lock", "w") as lock:
        lock.write("process 4711 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = refused(capsys, "prepare", "--input", "corpus.jsonl", "--tokenizer", tokenizer, "--output", "store")
        assert "store: another prepare is making this store (process 4711 on elsewhere)" in error
    assert main(["prepare", "--input", "corpus.jsonl", "--tokenizer", str(tokenizer), "--output", "store"]) == 0


def test_a_full_disk(folder: Path, tokenizer: Path) -> None:
    """A limit on file size stands in for the disk's end: the same write fails. What was finished is kept."""
    write_jsonl(Path("corpus.jsonl"), stdlib_texts(60))
    command = [*COMMAND, "prepare", "--input", "corpus.jsonl", "--tokenizer", str(tokenizer), "--quiet"]
    for workers in ("0", "2"):
        limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 100; exec "$@"', "-", *command]
        arguments = ["--output", f"store{workers}", "--workers", workers]
        run = subprocess.run([*limited, *arguments], capture_output=True, text=True, timeout=120)
        assert run.returncode == 2, run.stderr
        (line,) = run.stderr.splitlines()
        assert "cannot write: File too large; raise the file size limit (ulimit -f), and repeat the command" in line
        assert not Path(f"store{workers}").exists()
        assert not [*Path().rglob("*.tmp"), *Path(f".store{workers}.preparing").rglob("shard*")]
        run = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_really_full_disk(folder: Path, tokenizer: Path) -> None:
    write_jsonl(Path("corpus.jsonl"), stdlib_texts(60))
    Path("small").mkdir()
    script = (
        'mount -t tmpfs -o size=700k tmpfs small && "$@" --output small/store; code=$?; find small -name "store*"; '
        'find small -name "*.tmp"; exit $code'
    )
    command = [*COMMAND, "prepare", "--input", "corpus.jsonl", "--tokenizer", str(tokenizer), "--quiet"]
    namespace = ["unshare", "--mount", "bash", "-c", script, "-"]
    run = subprocess.run([*namespace, *command, "--workers", "1"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.splitlines()
    assert "cannot write: No space left on device; free some space, and repeat" in line and run.stdout == ""


def test_stores_that_verify_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = random_documents(50, 1, 999)
    documents[20][0] = 999
    write_prefix(Path("corpus"), documents, 1000)
    assert main(["verify", "corpus", "--vocab-size", "1000"]) == 0
    place = sum(map(len, documents[:20]))
    error = refused(capsys, "verify", "corpus", "--vocab-size", 999)
    assert f"corpus.bin: token {place} has the id 999, the vocabulary has 999 (0 to 998)" in error
    index = bytearray(Path("corpus.idx").read_bytes())
    offsets = np.frombuffer(index, "<i8", 50, 34 + 4 * 50)
    offsets[7] += 2
    Path("corpus.idx").write_bytes(index)
    assert "corpus.idx: sequence 7 begins at byte" in refused(capsys, "verify", "corpus")
    os.truncate("corpus.bin", 100)
    assert "corpus.bin: 100 bytes, but corpus.idx describes" in refused(capsys, "verify", "corpus")


def test_a_flipped_byte(folder: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(Path("corpus.jsonl"), stdlib_texts(3))
    command = ["prepare", "--input", "corpus.jsonl", "--tokenizer", str(tokenizer), "--output", "store", "--quiet"]
    assert main([*command, "--workers", "0"]) == 0
    assert main(["verify", "store"]) == 0
    for name in ("shard-00000.bin", "tokenizer/tokenizer.json"):
        data = bytearray(Path("store", name).read_bytes())
        data[101] ^= 1
        Path("store", name).write_bytes(data)
        assert f"store/{name}: " in refused(capsys, "verify", "store")
        data[101] ^= 1
        Path("store", name).write_bytes(data)


def test_inspect_names_documents_that_are_not_there(
    folder: Path, capsys: pytest.CaptureFixture[str], tokenizer: Path
) -> None:
    write_prefix(Path("corpus"), random_documents(5, 2), 1000)
    assert "no document 5: they are numbered 0 to 4" in refused(capsys, "inspect", "corpus", "--document", 5)
    assert main(["inspect", "corpus", "--document", "4", "--tokenizer", str(tokenizer)]) == 0
    assert "document 4: " in capsys.readouterr().out
