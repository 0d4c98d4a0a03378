"""Training goes on while a checkpoint is written: what is written is the moment of the save, and no failure is lost."""

import math
import os
import random
import re
import signal
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.torch_engine import GPT2, KINDS, PlainEngine, known
from tests.harness import RankFailed, run_ranks
from tests.tiny import plan_of, tiny_json, tiny_recipe, tiny_store, train_on_ranks
from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.cli import main
from zeropipe.trainer.checkpoint import writer as writing
from zeropipe.trainer.checkpoint.deepspeed_state import Live
from zeropipe.trainer.checkpoint.files import write_rank
from zeropipe.trainer.checkpoint.folder import ls, verify_checkpoints
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.checkpoint.snapshot import Snapshot, shares
from zeropipe.trainer.checkpoint.writer import SnapshotWriter
from zeropipe.trainer.families.specs import parameter_table
from zeropipe.trainer.metrics.reading import read_lines
from zeropipe.trainer.ranks.ranks import Ranks, init_distributed

pytestmark = pytest.mark.distributed

TABLE = parameter_table(GPT2)[:6]
STATE_BYTES = 3 * 4 * sum(math.prod(spec.shape) for spec in TABLE)


def _engine(ranks: Ranks, version: int) -> tuple[PlainEngine, Live]:
    engine = PlainEngine(ranks, TABLE, version)
    return engine, Live(engine, engine.parameters, ranks)


def _is_version(path: Path, version: int) -> bool:
    checkpoint = Checkpoint.open(path)
    return checkpoint.state["version"] == version and all(
        torch.equal(checkpoint.read(spec.name, kind), known(spec, kind, version)) for spec in TABLE for kind in KINDS
    )


def _save_and_train_on(output: Path, axes: dict[str, int]) -> tuple[list[Path], int]:
    ranks = init_distributed(**axes)
    engine, live = _engine(ranks, 1)
    allowed = threading.Event()

    def held_up(*arguments: Any) -> Any:
        allowed.wait()
        return write_rank(*arguments)

    writing.write_rank = held_up
    writer = SnapshotWriter(output, None, None, total_steps=0)
    state, probe = {"step": 3, "version": 1}, {"logits": torch.ones(2)}
    writer.save(live, state, probe)
    assert writer.poll() == [] and not list(output.glob("checkpoints/step-*"))
    for _, p in engine.parameters:
        with torch.no_grad():
            p.fill_(0)
        for kind in KINDS[1:]:
            engine.optimizer.state[p][kind].fill_(0)
    state["version"], engine.global_steps = 0, 99
    probe["logits"].zero_()
    allowed.set()
    published = writer.wait()
    assert writer.poll() == writer.wait() == []
    assert writer._snapshot is not None
    return published, writer._snapshot.nbytes


@pytest.mark.parametrize(("world", "axes"), [(1, {}), (2, {}), (2, {"tensor": 2}), (4, {"pipeline": 2})])
def test_what_is_written_is_the_moment_of_the_save_and_each_rank_copies_its_share(tmp_path, world, axes):
    found = run_ranks(world, _save_and_train_on, tmp_path, axes)
    published = [tmp_path / "checkpoints" / "step-00000003"]
    assert [own for own, _ in found] == [published] * world
    assert _is_version(published[0], 1)
    checkpoint = Checkpoint.open(published[0])
    assert checkpoint.state["engine"]["counters"]["global_steps"] == 1
    from safetensors.torch import load_file

    assert load_file(published[0] / "probe.safetensors")["logits"].tolist() == [1, 1]
    copied = sum(nbytes for _, nbytes in found)
    assert STATE_BYTES <= copied <= STATE_BYTES + 64 * 3 * len(TABLE) * world * 2  # what fills up a cache line


def test_the_copy_is_made_into_the_same_memory_every_time(monkeypatch):
    """Wherever what is copied has moved to: fresh memory costs as much again as the copy."""
    from zeropipe.trainer.checkpoint import snapshot

    monkeypatch.setattr(snapshot, "_BLOCK", 5000)
    engine, live = _engine(Ranks(), 1)
    copy = Snapshot()
    copy.take(shares(live))
    places = [block.data_ptr() for block in copy._blocks]
    kept = []
    for _ in range(5):
        for state in engine.optimizer.state.values():
            kept.append(dict(state))
            state |= {kind: state[kind].clone() for kind in KINDS[1:]}
        copy.take(shares(live))
        assert places == [block.data_ptr() for block in copy._blocks]


def test_a_copy_larger_than_a_block_is_spread_over_several(tmp_path, monkeypatch):
    from zeropipe.trainer.checkpoint import snapshot

    monkeypatch.setattr(snapshot, "_BLOCK", 5000)
    _, live = _engine(Ranks(), 1)
    writer = SnapshotWriter(tmp_path, None, None, total_steps=0)
    writer.save(live, {"step": 1, "version": 1})
    assert _is_version(writer.wait()[0], 1)
    assert writer._snapshot is not None and len(writer._snapshot._blocks) > 3


def test_no_memory_for_a_copy_is_said_with_what_to_do(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("can't allocate memory")

    _, live = _engine(Ranks(), 1)
    writer = SnapshotWriter(tmp_path, None, None, total_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        writer.save(live, {"step": 1})
    with pytest.raises(UserError, match=r"no host memory .*save\.background: false"):
        writer.wait()
    waiting = SnapshotWriter(tmp_path, None, None, total_steps=0, background=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        waiting.save(live, {"step": 1, "version": 1})
    (path,) = waiting.poll()
    assert _is_version(path, 1)


def _train_until_killed(output: Path, victim: int, delay: float) -> None:
    """Steps with collectives of their own, and a save whenever none is under way."""
    ranks = init_distributed()
    _, live = _engine(ranks, 1)
    timer = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL))
    timer.daemon = True
    writer = SnapshotWriter(output, 3, 2, total_steps=0)
    for step in range(1, 100_000):
        total = torch.full((1000,), float(step))
        dist.all_reduce(total)
        assert total[0] == 2 * step
        if writer.due(step):
            writer.save(live, {"step": step, "version": 1})
        for path in writer.poll():
            if ranks.is_main:
                with (output / "told").open("a") as file:
                    file.write(f"{path.name}\n")
            if ranks.rank == victim and timer.ident is None:
                timer.start()


def test_a_rank_killed_while_training_goes_on_loses_nothing_that_was_published(tmp_path):
    dice = random.Random(6)
    for attempt in range(6):
        output = tmp_path / str(attempt)
        output.mkdir()
        with pytest.raises(RankFailed):
            run_ranks(2, _train_until_killed, output, attempt % 2, dice.uniform(0.0, 0.4))
        told = (output / "told").read_text().split()
        assert all(problems == [] for problems in verify_checkpoints(output).values())
        assert Checkpoint.find(output).name >= told[-1] and _is_version(output, 1)


def _save_with_failures(output: Path, failures: int) -> tuple[list[str], str, list[str]]:
    """Rank 1's disk refuses so many times; at every step a poll, and a save where one is due."""
    ranks = init_distributed()
    _, live = _engine(ranks, 1)
    left = [failures if ranks.rank == 1 else 0]

    def failing(*arguments: Any) -> Any:
        time.sleep(0.02 * ranks.rank)  # the others are done long before
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return write_rank(*arguments)

    writing.write_rank = failing
    writer, published, warned = SnapshotWriter(output, 4, 2, total_steps=0), [], []
    writer._warn = warned.append
    try:
        for step in range(1, 13):
            if writer._stages is not None:
                futures.wait([writer._work])
            dist.barrier()
            if writer.due(step):
                writer.save(live, {"step": step, "version": 1})
            published += writer.poll()
        published += writer.wait()
    except UserError as error:
        return [path.name for path in published], f"{step}: {error}", warned
    return [path.name for path in published], "", warned


def test_a_save_that_failed_on_one_rank_is_tried_again_at_the_next_step(tmp_path):
    steps = ["step-00000008", "step-00000012"]  # 4 and 6 fail, which is found out at 5 and 7
    found = run_ranks(2, _save_with_failures, tmp_path, 2)
    published, said, warned = found[0]
    assert found[0] == found[1] and (published, said) == (steps, "")
    told = "No space left on device (on rank 1); free some space; trying again"
    assert len(warned) == 2 and all(told in text for text in warned)
    assert all(problems == [] for problems in verify_checkpoints(tmp_path).values())


def test_a_run_whose_saves_go_on_failing_ends_on_all_ranks_at_once(tmp_path):
    found = run_ranks(2, _save_with_failures, tmp_path, 9)
    assert found[0] == found[1]
    published, said, _ = found[0]
    assert published == [] and re.match(
        r"9: .*cannot write the checkpoint.*No space left on device \(on rank 1\)", said
    )
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_disk_slower_than_the_cadence_holds_training_up_and_is_told_once(tmp_path, monkeypatch, capfd):
    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return write_rank(*arguments)

    monkeypatch.setattr(writing, "write_rank", slow)
    monkeypatch.setattr(writing, "_PATIENCE", 0.01)
    _, live = _engine(Ranks(), 1)
    writer = SnapshotWriter(tmp_path, 1, None, total_steps=3)
    for step in (1, 2, 3):
        writer.save(live, {"step": step, "version": 1})
    assert len(writer.wait()) == 3
    assert capfd.readouterr().err.count("warning: step 2 waited 0 s") == 1


def test_the_last_checkpoint_that_was_read_back_stays_until_another_one_has_been(tmp_path, monkeypatch):
    _, live = _engine(Ranks(), 1)
    read: list[str] = []

    def reading(path: Path, files: Any) -> str | None:
        read.append(path.name[-2:])
        return original(path, files)

    original = writing.read_back
    monkeypatch.setattr(writing, "read_back", reading)
    writer = SnapshotWriter(tmp_path, 1, 3, total_steps=0)
    for step in range(1, 11):
        writer.save(live, {"step": step, "version": 1})
        writer.wait()
        there = [item.path.name[-2:] for item in ls(tmp_path)]
        assert len(there) == min(step, 3) and (step <= 3 or set(there) & set(read))
    assert read == ["04", "07", "10"]


def test_what_a_bad_disk_keeps_wrong_replaces_nothing(tmp_path, monkeypatch, capfd):
    _, live = _engine(Ranks(), 1)
    writer = SnapshotWriter(tmp_path, 1, 1, total_steps=0)
    writer.save(live, {"step": 1, "version": 1})
    writer.wait()

    def damaging(folder: Path, *arguments: Any) -> Any:
        written = write_rank(folder, *arguments)
        path = folder / "rank-00000.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return written

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_rank", damaging)
        writer.save(live, {"step": 2, "version": 1})
        with pytest.raises(UserError, match=r"what has just been written is damaged: .*step-00000002.*xxh3_128"):
            writer.wait()
    assert writer.due(3)
    writer.save(live, {"step": 3, "version": 1})
    writer.wait()
    assert "; trying again" in capfd.readouterr().err
    assert _is_version(tmp_path / "checkpoints" / "step-00000003", 1)


def test_milestones_are_kept_for_ever(tmp_path, capsys):
    _, live = _engine(Ranks(), 1)
    writer = SnapshotWriter(tmp_path, 2, 1, total_steps=11, milestone=4)
    for step in range(1, 12):
        if writer.due(step):
            writer.save(live, {"step": step, "version": 1})
        writer.poll()
    writer.wait()
    assert [(item.step, item.milestone) for item in ls(tmp_path)] == [(4, True), (8, True), (11, False)]
    assert main(["ckpt", "prune", str(tmp_path), "--keep", "1"]) == 0
    assert main(["ckpt", "ls", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nothing to remove"
    assert ["whole, milestone" in line for line in lines[1:]] == [True, True, False]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("background") / "store", documents=60)


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_a_run_is_the_same_whether_it_waits_or_not(tmp_path, store, zero):
    found = {}
    for background in (True, False):
        save = {"every": 1, "keep": 2, "milestone": 3, "background": background}
        recipe = tiny_recipe(store, tmp_path / str(background), duration={"steps": 5}, save=save)
        found[background] = train_on_ranks(2, recipe, tiny_json(zero))
        events = [r for r in read_lines(tmp_path / str(background)) if r.get("event") == "save"]
        assert [r["step"] for r in events] == [1, 2, 3, 4, 5]
        for event in events:
            assert event["path"].endswith(f"step-{event['step']:08d}")
            assert sum(event["drawn"].values()) == 8 * event["step"], event
    assert found[True]["loss"] == found[False]["loss"] and found[True]["grad_norm"] == found[False]["grad_norm"]
    pairs = zip(*(ls(tmp_path / str(background)) for background in (True, False)), strict=True)
    for one, other in pairs:
        assert one.step == other.step
        first, second = Checkpoint.open(one.path), Checkpoint.open(other.path)
        assert first.state == second.state
        for name in first.names():
            for kind in first.kinds(name):
                assert torch.equal(first.read(name, kind), second.read(name, kind))


def _fail_at(recipe: dict, ds: dict, fails: int) -> str:
    from zeropipe.trainer.engine.zero import ZeroEngine
    from zeropipe.trainer.loop import train
    from zeropipe.trainer.ranks.ranks import join_world

    step = ZeroEngine.train_step

    def failing(self, stream, number, *asked):
        if number == fails:
            raise UserError("the loss is no number")
        return step(self, stream, number, *asked)

    def slow(*arguments: Any) -> Any:
        time.sleep(0.3)
        return write_rank(*arguments)

    ZeroEngine.train_step, writing.write_rank = failing, slow
    ranks = join_world()
    with pytest.raises(UserError) as error:
        train(plan_of(recipe, ds, ranks.world), ranks.lay_out(1, 1, 1))
    return str(error.value)


def test_a_run_that_ends_on_all_ranks_publishes_what_it_had_begun(tmp_path, store):
    recipe = tiny_recipe(store, tmp_path / "run", duration={"steps": 5}, save={"every": 2})
    assert run_ranks(2, _fail_at, recipe, tiny_json("zero1"), 2) == ["the loss is no number"] * 2
    assert [(item.step, item.problem) for item in ls(tmp_path / "run")] == [(2, None)]
    assert [r["step"] for r in read_lines(tmp_path / "run") if r.get("event") == "save"] == [2]
