"""The whole of `prepare`, by its function and by its command line."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.data_prep.samples import (
    documents_of,
    expected_tokens,
    megatron_files,
    nasty_texts,
    stdlib_texts,
    write_jsonl,
)
from zeropipe.data_prep.corpus.sources import SourceOptions
from zeropipe.data_prep.errors import UserError
from zeropipe.data_prep.making import encoding, tasks
from zeropipe.data_prep.making.assemble import Assembly
from zeropipe.data_prep.making.options import Options
from zeropipe.data_prep.making.prepare import prepare
from zeropipe.data_prep.making.tasks import Filters
from zeropipe.data_prep.store import TokenStore
from zeropipe.data_prep.verify import verify

TEXTS = [line for text in stdlib_texts(40) for line in text.split("\n\n")]
SMALL_TASKS = SourceOptions(task_bytes=100_000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About a megabyte in several thousand short documents, some of them empty, some of them equal."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", TEXTS)


@pytest.fixture
def options(tmp_path: Path, corpus: Path, tokenizer: Path) -> Options:
    return Options(tmp_path / "store", (str(corpus),), tokenizer=tokenizer, source=SMALL_TASKS, workers=0, quiet=True)


def files_of(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def assert_same_bytes(one: Path, other: Path) -> None:
    assert files_of(one) == files_of(other)
    _, different, errors = filecmp.cmpfiles(one, other, map(str, files_of(one)), shallow=False)
    assert not different and not errors


def test_a_store_is_what_a_second_writer_makes(tmp_path: Path, tokenizer: Path) -> None:
    """Read by json, encoded by Hugging Face, written by thirty lines of struct: the same bytes."""
    texts = [*nasty_texts(), "", *stdlib_texts(20), "".join(stdlib_texts(80))]  # the last: over two megabytes
    path = write_jsonl(tmp_path / "nasty.jsonl", texts)
    store = prepare(Options(tmp_path / "store", (str(path),), tokenizer=tokenizer, workers=0, quiet=True))
    kept = [text for text in texts if text]
    binary, index = megatron_files(expected_tokens(tokenizer, kept), 1000)
    assert (tmp_path / "store/shard-00000.bin").read_bytes() == binary
    assert (tmp_path / "store/shard-00000.idx").read_bytes() == index
    assert store.text_bytes == sum(len(text.encode()) for text in kept)
    assert (store.vocab_size, store.eod_id, store.tokenizer) == (1000, 0, tmp_path / "store/tokenizer")
    assert store.manifest is not None
    assert store.manifest.counts == {"empty": 1, "kept": len(kept), "read": len(texts)}
    assert not list(tmp_path.glob(".store*"))


def test_the_number_of_workers_changes_no_byte(tmp_path: Path, options: Options) -> None:
    prepare(options)
    for workers in (1, 3):
        prepare(replace(options, output=tmp_path / f"with{workers}", workers=workers))
        assert_same_bytes(tmp_path / "store", tmp_path / f"with{workers}")
    prepare(replace(options, output=tmp_path / "big", source=replace(SMALL_TASKS, task_bytes=1 << 30)))
    for suffix in ("bin", "idx"):  # nor does the cut into tasks, which only the manifest records
        assert filecmp.cmp(tmp_path / f"store/shard-00000.{suffix}", tmp_path / f"big/shard-00000.{suffix}", False)


def kept_texts(store: TokenStore, tokenizer: Path) -> list[str]:
    known = {tuple(tokens): text for text, tokens in zip(TEXTS, expected_tokens(tokenizer, TEXTS), strict=True)}
    return [known[tuple(tokens)] for tokens in documents_of(store)]


@pytest.mark.parametrize("shuffle", [None, 7])
def test_duplicates_go_and_the_first_stays(options: Options, tokenizer: Path, shuffle: int | None) -> None:
    store = prepare(replace(options, assembly=Assembly(deduplicate=True, shuffle=shuffle)))
    expected = list(dict.fromkeys(text for text in TEXTS if text))
    found = kept_texts(store, tokenizer)
    if shuffle is not None:
        assert found != expected
        found, expected = sorted(found), sorted(expected)
    assert found == expected
    assert store.manifest is not None
    assert store.manifest.counts["duplicates"] == len([text for text in TEXTS if text]) - len(expected) > 10
    assert not verify(store.path)


def test_many_passes_find_the_same_duplicates(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    from zeropipe.data_prep.making import assemble

    one = prepare(replace(options, assembly=Assembly(deduplicate=True)))
    monkeypatch.setattr(assemble, "DIGESTS", 500)
    many = prepare(replace(options, output=options.output.with_name("many"), assembly=Assembly(deduplicate=True)))
    assert_same_bytes(one.path, many.path)


def test_a_shuffle_is_one_of_its_seed(tmp_path: Path, options: Options, tokenizer: Path) -> None:
    plain = [text for text in TEXTS if text]
    orders = {}
    for seed, workers in ((1, 0), (1, 2), (2, 0)):
        output = tmp_path / f"{seed}-{workers}"
        store = prepare(replace(options, output=output, workers=workers, assembly=Assembly(shuffle=seed)))
        orders[seed, workers] = kept_texts(store, tokenizer)
        assert sorted(orders[seed, workers]) == sorted(plain)
    assert orders[1, 0] == orders[1, 2] != orders[2, 0]
    half = len(plain) // 2  # thoroughly mixed: about half of the first half comes from the first half
    share = len(set(orders[1, 0][:half]) & set(plain[:half])) / len(set(plain[:half]))
    assert 0.4 < share < 0.6


def test_filters_and_what_they_drop(options: Options, tokenizer: Path) -> None:
    filters = Filters(min_bytes=50, max_bytes=2000, keep=r"self", drop=r"(?i)todo|xxx")
    store = prepare(replace(options, filters=filters))

    def wanted(text: str) -> bool:
        lower = text.lower()
        return 50 <= len(text.encode()) <= 2000 and "self" in text and "todo" not in lower and "xxx" not in lower

    assert kept_texts(store, tokenizer) == [text for text in TEXTS if wanted(text)]
    assert store.manifest is not None
    counts = store.manifest.counts
    assert sum(number for name, number in counts.items() if name != "read") == counts["read"] == len(TEXTS)
    assert min(counts[name] for name in ("too short", "too long", "not matching --keep-regex")) > 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_limit_keeps_the_first_documents(options: Options, tokenizer: Path, workers: int) -> None:
    store = prepare(replace(options, workers=workers, assembly=Assembly(limit_documents=100)))
    assert kept_texts(store, tokenizer) == [text for text in TEXTS if text][:100]
    assert store.manifest is not None
    assert 100 < store.manifest.counts["read"] < len(TEXTS) // 2  # and reads little more


@pytest.fixture
def counted_tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of the tasks that are done from here on."""
    done: list[int] = []
    run = tasks.Worker.run

    def counted(self, task, *args):
        record = run(self, task, *args)
        done.append(task.number)
        return record

    monkeypatch.setattr(tasks.Worker, "run", counted)
    return done


def stop_after(options: Options, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a preparation that is interrupted in the middle, as by Ctrl-C."""
    with monkeypatch.context() as patch:
        run, done = tasks.Worker.run, []

        def interrupted(self, task, *args):
            if len(done) == number:
                raise KeyboardInterrupt
            done.append(task.number)
            return run(self, task, *args)

        patch.setattr(tasks.Worker, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(options)


def test_a_repeated_command_does_only_what_is_missing(
    tmp_path: Path, options: Options, counted_tasks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(options, 4, monkeypatch)
    assert counted_tasks == [0, 1, 2, 3] and not options.output.exists()
    part = next((tmp_path / ".store.preparing/parts").glob("0000001.bin"))
    part.write_bytes(part.read_bytes()[:-4])  # a part that is not what its record says is made again
    prepare(options)
    assert counted_tasks[4:] == [1, *range(4, max(counted_tasks) + 1)]
    whole = prepare(replace(options, output=tmp_path / "undisturbed"))
    assert_same_bytes(options.output, whole.path)


def test_work_of_another_command_is_not_thrown_away(
    options: Options, counted_tasks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(options, 2, monkeypatch)
    with pytest.raises(UserError, match=r"unfinished work of another command .*text_key.*--overwrite"):
        prepare(replace(options, text_key="body"))
    prepare(replace(options, assembly=Assembly(shuffle=1)))  # what concerns only the assembly keeps the parts
    assert counted_tasks.count(0) == 1


def test_what_was_skipped_is_not_taken_for_faultless(
    options: Options, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": 1}\n' + corpus.read_text())
    skipping = replace(options, inputs=(str(bad),), on_error="skip")
    stop_after(skipping, 2, monkeypatch)
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1: the value of 'text' is a number"):
        prepare(replace(skipping, on_error="stop"))
    assert prepare(skipping).num_documents == len([text for text in TEXTS if text])


def test_a_corrected_file_costs_only_its_own_task(tmp_path: Path, tokenizer: Path, counted_tasks: list[int]) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", TEXTS[:50]) for name in "abc"]
    paths[2].write_text('{"text": 5}\n')
    inputs = tuple(map(str, paths))
    options = Options(tmp_path / "store", inputs, tokenizer=tokenizer, source=SMALL_TASKS, workers=0, quiet=True)
    paths[0].write_text(paths[0].read_text() * 200)  # so that it has a task to itself
    with pytest.raises(UserError, match=r"c\.jsonl, line 1: the value of 'text' is a number"):
        prepare(options)
    before = len(counted_tasks)
    assert before >= 1
    write_jsonl(paths[2], TEXTS[:50])
    prepare(options)
    assert len(set(counted_tasks[:before]) & set(counted_tasks[before:])) == 0


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_killed_while_it_cleans_up_has_made_its_store(
    options: Options, counted_tasks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("zeropipe.data_prep.making.workspace.Workspace.discard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(options)
    before = list(counted_tasks)
    with pytest.raises(UserError, match="exists already"):  # another order of the documents is another store
        prepare(replace(options, assembly=Assembly(shuffle=1)))
    store = prepare(options)
    assert counted_tasks == before and not verify(store.path)
    assert not list(options.output.parent.glob(".store*"))


def test_encoders_that_differ_midway_start_the_job_again(
    tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store must not be half of the one and half of the other."""
    expected = prepare(options)
    monkeypatch.setattr(encoding, "CHECK_BYTES", 300_000)
    check = encoding.Fast._check

    def wrong_later(self, documents):
        checked = self._unchecked is None
        check(self, documents)
        if not checked and self._unchecked == 0:
            raise encoding.EncodersDiffer("gigatoken and Hugging Face tokenizers differ on 'x'")

    monkeypatch.setattr(encoding.Fast, "_check", wrong_later)
    store = prepare(replace(options, output=tmp_path / "again"))
    assert "differ on 'x': starting again with Hugging Face tokenizers" in capsys.readouterr().err
    assert_same_bytes(expected.path, store.path)


def test_a_trained_tokenizer_has_the_size_asked_for(tmp_path: Path, options: Options) -> None:
    trained = replace(options, tokenizer=None, train_tokenizer=700, eod_token="<end>")
    store = prepare(trained)
    assert (store.vocab_size, store.eod_id) == (700, 0)
    assert store.tokenizer is not None
    assert json.loads((store.tokenizer / "tokenizer_config.json").read_text())["eos_token"] == "<end>"
    kept = [text for text in TEXTS if text]
    assert documents_of(store) == expected_tokens(store.tokenizer, kept, "<end>")
    again = prepare(replace(trained, output=tmp_path / "again", workers=2))
    assert_same_bytes(store.path, again.path)


def test_a_finished_store_is_not_overwritten_unasked(options: Options) -> None:
    store = prepare(options)
    with pytest.raises(UserError, match=r"store: exists already; .*--overwrite"):
        prepare(options)
    other = prepare(replace(options, overwrite=True, assembly=Assembly(limit_documents=5)))
    assert other.num_documents == 5 and other.fingerprint != store.fingerprint
    assert not list(options.output.parent.glob(".store*"))
