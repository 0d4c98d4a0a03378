"""Deaths, full disks and damage: there is always a whole checkpoint, and what is not whole is told and never loaded."""

import errno
import math
import os
import random
import re
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed.torch_engine import GPT2, KINDS, PlainEngine, known
from tests.harness import RankFailed, run_ranks
from tests.saving import save
from zeropipe.data_prep import durable
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.adapters.bases import base_of
from zeropipe.trainer.checkpoint.deepspeed_state import Live
from zeropipe.trainer.checkpoint.files import HashedFile
from zeropipe.trainer.checkpoint.loader import load, resolve_resume
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.families.specs import parameter_table
from zeropipe.trainer.ranks.ranks import Ranks, init_distributed

pytestmark = pytest.mark.distributed

TABLE = parameter_table(GPT2)[:4]  # few, so that every operation on files can be tried


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    """What is gone here stays gone."""
    monkeypatch.setattr(durable, "PAUSES", ())


def _save(ranks: Ranks, output: Path, step: int, version: int, keep: int | None = 1) -> Path:
    engine = PlainEngine(ranks, TABLE, version)
    return save(Live(engine, engine.parameters, ranks), output, {"step": step, "version": version}, keep)


def resumed_from(output: Path, resume: str) -> Path | None:
    checkpoint = resolve_resume(output, resume, Ranks())
    return checkpoint and checkpoint.path


class Fault:
    """Does something at the n-th operation on files; `count` tells how many there were."""

    def __init__(self, at: int | None, action: Callable[[], None]) -> None:
        self.at, self.action, self.count = at, action, 0

    def install(self, patch: pytest.MonkeyPatch) -> "Fault":
        for owner, name in [
            (HashedFile, "write"),
            (os, "fsync"),
            (os, "unlink"),
            (os, "rmdir"),
            (Path, "mkdir"),
            (Path, "rename"),
            (Path, "replace"),
        ]:
            patch.setattr(owner, name, self._before(getattr(owner, name)))
        return self

    def _before(self, original: Callable) -> Callable:
        def operation(*args, **kwargs):
            self.count += 1
            if self.count - 1 == self.at:
                self.action()
            return original(*args, **kwargs)

        return operation


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _check_whole(output: Path) -> int:
    """The run directory resolves to a checkpoint with all the tensors of the save that its state tells of."""
    checkpoint = resolve_resume(output, "auto", Ranks())
    assert checkpoint is not None and Checkpoint.find(output) == checkpoint.path
    version = checkpoint.state["version"]
    for spec in TABLE:
        for kind in KINDS:
            assert torch.equal(checkpoint.read(spec.name, kind), known(spec, kind, version))
    return version


def _check_saves_again(output: Path) -> None:
    """The next save works, and nothing is left of the one that died."""
    path = _save(Ranks(), output, 3, 3)
    assert _check_whole(output) == 3
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", path.name]


def _save_and_die(output: Path, step: int, at: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Fault(at, _die).install(patch)
        _save(Ranks(), output, step, 2)


@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        counting = Fault(None, _die).install(patch)
        _save(Ranks(), tmp_path / "counted", 1, 1)
        before = counting.count
        _save(Ranks(), tmp_path / "counted", step, 2)
    operations = counting.count - before
    assert operations > 15
    versions = []
    for at in range(operations):
        output = tmp_path / str(at)
        _save(Ranks(), output, 1, 1)
        with pytest.raises(RankFailed, match="died without a word"):
            run_ranks(1, _save_and_die, output, step, at)
        versions.append(_check_whole(output))
        _check_saves_again(output)
    assert versions == sorted(versions) and set(versions) == {1, 2}, versions


def test_a_full_disk_at_any_operation_is_one_clear_error_and_the_old_checkpoint_stays(tmp_path, monkeypatch, capfd):
    """Once the new one is published, what cannot be removed is a warning, and removed with the next save."""
    warned = 0
    for at in range(1000):
        output = tmp_path / str(at)
        _save(Ranks(), output, 1, 1)
        with monkeypatch.context() as patch:
            fault = Fault(at, _disk_full).install(patch)
            message = _error_of(lambda output=output: _save(Ranks(), output, 2, 2))
        if fault.count <= at:
            break
        told = message or capfd.readouterr().err
        assert "No space left on device" in told and str(output) in told
        assert _check_whole(output) in ((1, 2) if message else (2,))
        assert not message or not list((output / "checkpoints").glob(".step-*"))
        assert message or told.startswith("warning: ")
        warned += not message
        _check_saves_again(output)
    assert at > 15 and not message and warned > 0


def _error_of(action: Callable[[], object]) -> str:
    """Message of the user's error that this ends with; empty if it ends well."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def _save_until_killed(output: Path, victim: int, delay: float) -> None:
    ranks = init_distributed(pipeline=2)
    engine = PlainEngine(ranks, TABLE, 2)
    if ranks.rank == victim:
        timer = threading.Timer(delay, _die)
        timer.daemon = True
        timer.start()
    for step in range(2, 10_000):
        save(Live(engine, engine.parameters, ranks), output, {"step": step, "version": 2}, keep=2)


def test_a_rank_killed_at_any_time_leaves_a_whole_checkpoint(tmp_path):
    dice = random.Random(5)
    for attempt in range(6):
        output = tmp_path / str(attempt)
        _save(Ranks(), output, 1, 1)
        with pytest.raises(RankFailed):
            run_ranks(2, _save_until_killed, output, attempt % 2, dice.uniform(0.0, 0.4))
        assert _check_whole(output) in (1, 2)
        _check_saves_again(output)


def _save_with_limit(output: Path) -> str:
    ranks = init_distributed(pipeline=2)
    engine = PlainEngine(ranks, TABLE, 2)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    return _error_of(lambda: save(Live(engine, engine.parameters, ranks), output, {"step": 2, "version": 2}, keep=1))


def test_one_rank_that_cannot_write_stops_the_save_of_all_with_one_error(tmp_path):
    _save(Ranks(), tmp_path, 1, 1)
    errors = run_ranks(2, _save_with_limit, tmp_path)
    assert errors[0] == errors[1]
    assert str(tmp_path) in errors[0] and "File too large (on rank 1)" in errors[0] and "untouched" in errors[0]
    assert _check_whole(tmp_path) == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/checkpoints: cannot write the checkpoint")):
        _save(Ranks(), tmp_path, 1, 1)


def _resolve_and_load(output: Path, resume: str):
    """What each rank does at start-up."""
    ranks = init_distributed(pipeline=2)
    try:
        checkpoint = resolve_resume(output, resume, ranks)
    except UserError as error:
        return "refused", str(error)
    if checkpoint is None:
        return "fresh", ""
    engine = PlainEngine(ranks, TABLE, None)
    state = load(Live(engine, engine.parameters, ranks), checkpoint)
    return state["version"], engine.wrong(state["version"])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "flipped byte": _flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path, capfd, damage, file):
    _save(Ranks(), tmp_path, 1, 1, keep=None)
    newest = _save(Ranks(), tmp_path, 2, 2, keep=None)
    DAMAGE[damage](newest / file)
    assert resumed_from(tmp_path, "auto") == newest.parent / "step-00000001"
    warning = capfd.readouterr().err
    assert warning.startswith("warning: damaged checkpoint: ") and str(newest / file) in warning
    with pytest.raises(UserError, match=re.escape(str(newest / file))):
        resolve_resume(tmp_path, str(newest), Ranks())
    engine = PlainEngine(Ranks(), TABLE, None)
    with pytest.raises(UserError, match=re.escape(str(newest / file))):
        load(Live(engine, engine.parameters, Ranks()), newest)
    assert all((p == 9).all() for _, p in engine.parameters), "nothing may be loaded before all is verified"


def _refuse_to_open(patch: pytest.MonkeyPatch, file: Path, number: int, times: float = math.inf) -> list[Path]:
    """Opening `file` fails so many times; what is given back fills with the failures."""
    failed, real = [], Path.open

    def failing(path: Path, *args, **kwargs):
        if path == file and len(failed) < times:
            failed.append(path)
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    patch.setattr(Path, "open", failing)
    return failed


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "manifest.json"])
def test_what_cannot_be_read_is_damage_and_the_checkpoint_before_it_is_taken(
    tmp_path, capfd, monkeypatch, file, number
):
    _save(Ranks(), tmp_path, 1, 1, keep=None)
    newest = _save(Ranks(), tmp_path, 2, 2, keep=None)
    _refuse_to_open(monkeypatch, newest / file, number)
    assert resumed_from(tmp_path, "auto") == newest.parent / "step-00000001"
    told = f"warning: damaged checkpoint: {newest / file}: cannot be read: {os.strerror(number)}"
    assert capfd.readouterr().err.startswith(told)
    assert Checkpoint.open(tmp_path).path == newest.parent / "step-00000001"  # eval, export, model.init
    assert base_of(str(tmp_path), 0).init == str(newest.parent / "step-00000001")  # and what an adapter says of it


@pytest.mark.parametrize("lost", ["rank-00000.safetensors", "state.json", "manifest.json", ""])
def test_what_is_out_of_sight_for_a_moment_rolls_no_run_back(tmp_path, capfd, monkeypatch, lost):
    """A file, or the whole folder that `latest` names: attributes out of an NFS client's cache."""
    _save(Ranks(), tmp_path, 1, 1, keep=None)
    newest = _save(Ranks(), tmp_path, 2, 2, keep=None)
    for resume in (lambda: resumed_from(tmp_path, "auto"), lambda: Checkpoint.open(tmp_path).path):
        (newest / lost).rename(tmp_path / "hidden")
        asked: list[float] = []

        def pause(seconds: float, asked: list[float] = asked) -> None:
            asked.append(seconds)
            if len(asked) == 2:
                (tmp_path / "hidden").rename(newest / lost)

        monkeypatch.setattr(durable, "PAUSES", (0.5, 2.0, 5.0))
        monkeypatch.setattr(durable.time, "sleep", pause)
        assert resume() == newest and asked == [0.5, 2.0]
    assert "damaged" not in capfd.readouterr().err


def _resume_from_a_stale_server(output: Path, newest: Path) -> tuple[str, int]:
    """Rank 1's reads fail with ESTALE, twice."""
    ranks = init_distributed(pipeline=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "PAUSES", (0.01, 0.01, 0.01))
        times = 2 if ranks.rank == 1 else 0
        failed = _refuse_to_open(patch, newest / "rank-00001.safetensors", errno.ESTALE, times)
        checkpoint = resolve_resume(output, "auto", ranks)
    assert checkpoint is not None
    return checkpoint.path.name, len(failed)


def _save_on_two(output: Path) -> Path:
    ranks = init_distributed(pipeline=2)
    _save(ranks, output, 1, 1, keep=None)
    return _save(ranks, output, 2, 2, keep=None)


def test_one_rank_of_several_that_loses_sight_of_a_file_rolls_no_run_back(tmp_path):
    newest, _ = run_ranks(2, _save_on_two, tmp_path)
    resumed = run_ranks(2, _resume_from_a_stale_server, tmp_path, newest)
    assert [name for name, _ in resumed] == [newest.name] * 2 and sum(failed for _, failed in resumed) == 2


def test_all_ranks_agree_on_what_to_resume(tmp_path):
    _save(Ranks(), tmp_path, 1, 1, keep=None)
    newest = _save(Ranks(), tmp_path, 2, 2, keep=None)
    assert run_ranks(2, _resolve_and_load, tmp_path, "auto") == [(2, [])] * 2
    _flip(newest / "rank-00000.safetensors")
    assert run_ranks(2, _resolve_and_load, tmp_path, "auto") == [(1, [])] * 2
    assert run_ranks(2, _resolve_and_load, tmp_path, "never") == [("fresh", "")] * 2
    first = newest.parent / "step-00000001"
    assert run_ranks(2, _resolve_and_load, tmp_path / "new", str(first)) == [(1, [])] * 2
    _flip(first / "state.json")
    refusals = run_ranks(2, _resolve_and_load, tmp_path, "auto")
    assert refusals[0] == refusals[1] and refusals[0][0] == "refused"
    assert "no whole checkpoint" in refusals[0][1] and refusals[0][1].count("xxh3_128 is") == 2


def test_a_fresh_start_and_a_path_that_holds_nothing(tmp_path):
    assert resolve_resume(tmp_path / "new", "auto", Ranks()) is None
    with pytest.raises(UserError, match=r"resume: .*elsewhere holds no checkpoint"):
        resolve_resume(tmp_path, str(tmp_path / "elsewhere"), Ranks())
    _save(Ranks(), tmp_path, 1, 1)
    assert resolve_resume(tmp_path, "never", Ranks()) is None


def test_a_run_that_is_resumed_from_elsewhere_leaves_the_other_run_alone(tmp_path):
    """Another run may be writing there right now."""
    path = _save(Ranks(), tmp_path / "other", 1, 1)
    growing = path.parent / ".step-00000002.partial"
    growing.mkdir()
    assert resumed_from(tmp_path / "mine", str(tmp_path / "other")) == path
    assert growing.is_dir()


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_loaded(tmp_path):
    path = _save(Ranks(), tmp_path, 1, 1)
    engine = PlainEngine(Ranks(), parameter_table(GPT2)[1:5], None)
    with pytest.raises(UserError) as error:
        load(Live(engine, engine.parameters, Ranks()), path)
    for problem in ("attn.c_attn.weight is not in the checkpoint", "transformer.wte.weight is not in the model"):
        assert problem in str(error.value)
    engine = PlainEngine(Ranks(), parameter_table(GPT2 | {"n_positions": 8})[:4], None)
    with pytest.raises(UserError, match=re.escape("wpe.weight is [16, 32] in the checkpoint and [8, 32] in the model")):
        load(Live(engine, engine.parameters, Ranks()), path)
    assert all((p == 9).all() for _, p in engine.parameters)


def test_every_file_is_on_the_disk_before_the_name_is_given(tmp_path, monkeypatch):
    """After a power cut, a folder named step-… must not hold files that never left the page cache."""
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def recorded_sync(descriptor: int) -> None:
        sync(descriptor)
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    def recorded_rename(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name} {Path(target).name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    _save(Ranks(), tmp_path, 1, 1)
    assert events == [
        "sync rank-00000.safetensors",
        "sync state.json",
        "sync index.safetensors",
        "sync manifest.json",
        "sync .step-00000001.partial",
        "rename .step-00000001.partial step-00000001",
        "sync checkpoints",
        "sync .latest.partial",
        "sync checkpoints",
    ]
