"""What many ranks read of a checkpoint together: every file once, whatever asks for it. Ranks are threads here."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from scripts.simulated_ranks import SimulatedRanks, on_simulated_ranks
from tests.distributed.torch_engine import GPT2, PlainEngine
from zeropipe.trainer.adapters.merged import initial_values
from zeropipe.trainer.checkpoint import files as checkpoint_files
from zeropipe.trainer.checkpoint import index as checkpoint_index
from zeropipe.trainer.checkpoint import sharing
from zeropipe.trainer.checkpoint.deepspeed_state import Live
from zeropipe.trainer.checkpoint.loader import load, resolve_resume
from zeropipe.trainer.checkpoint.writer import SnapshotWriter
from zeropipe.trainer.families.specs import parameter_table

WORLD = 8
TABLE = parameter_table(GPT2)[:4]


def _save(ranks: SimulatedRanks, run: Path) -> None:
    engine = PlainEngine(ranks, TABLE, 1)
    writer = SnapshotWriter(run, 1, None, total_steps=1)
    writer.save(Live(engine, engine.parameters, ranks), {"step": 1, "model_config": GPT2})
    writer.wait()


@pytest.fixture
def run(tmp_path) -> Path:
    on_simulated_ranks(WORLD, lambda ranks: _save(ranks, tmp_path / "run"))
    return tmp_path / "run"


@pytest.mark.parametrize("start", ["resume", "model.init"])
def test_every_file_is_looked_at_by_two_ranks_and_hashed_once(start, run, monkeypatch):
    """By rank 0, for its size, and twice by the rank that hashes it; before, by every rank."""
    looked: list[str] = []
    hashed: list[str] = []
    sizes, digests = checkpoint_files.size_problems, checkpoint_files.digest_problems

    def counting_sizes(folder: Path, names: Mapping) -> list[str]:
        looked.extend(names)
        return sizes(folder, names)

    def counting_digests(folder: Path, names: Mapping, kind: str) -> list[str]:
        hashed.extend(names)
        return digests(folder, names, kind)

    monkeypatch.setattr(checkpoint_files, "size_problems", counting_sizes)
    monkeypatch.setattr(sharing, "size_problems", counting_sizes)
    monkeypatch.setattr(sharing, "digest_problems", counting_digests)
    if start == "resume":
        on_simulated_ranks(WORLD, lambda ranks: resolve_resume(run, "auto", ranks))
    else:
        on_simulated_ranks(WORLD, lambda ranks: initial_values(str(run), ranks))
    (step,) = (run / "checkpoints").glob("step-*")
    files = sorted(path.name for path in step.iterdir() if path.name != "manifest.json")
    assert len(files) == WORLD + 2
    assert sorted(hashed) == files
    assert sorted(looked) == sorted(3 * files)


def test_a_rank_opens_what_it_reads_and_no_header_is_scanned(run, monkeypatch):
    monkeypatch.setattr(checkpoint_index, "_scanned", None)  # calling it fails

    def reload(ranks: SimulatedRanks) -> tuple[list[str], list[str]]:
        engine = PlainEngine(ranks, TABLE, None)
        checkpoint = resolve_resume(run, "auto", ranks)
        assert checkpoint is not None
        load(Live(engine, engine.parameters, ranks), checkpoint)
        own = checkpoint.part(TABLE[0].name)[slice(0, 1), slice(0, 4)]
        assert own.shape == (1, 4)
        return engine.wrong(1), sorted(checkpoint._open)

    for (wrong, opened), _ in on_simulated_ranks(WORLD, reload):
        assert wrong == [] and len(opened) == WORLD  # without ZeRO a rank reads all


def test_without_an_index_it_is_read_from_the_headers(run):
    """As checkpoints of earlier versions are."""
    (step,) = (run / "checkpoints").glob("step-*")
    with_index = checkpoint_index.BoxIndex.open(step, list)
    files = [path.name for path in sorted(step.glob("rank-*"))]
    (step / checkpoint_index.INDEX).unlink()
    scanned = checkpoint_index.BoxIndex.open(step, lambda: files)
    assert scanned.shapes == with_index.shapes
    for spec in TABLE:
        assert scanned.kinds(spec.name) == with_index.kinds(spec.name) == ["exp_avg", "exp_avg_sq", "master"]
        for kind in scanned.kinds(spec.name):
            whole = checkpoint_index.Box.whole(spec.shape)
            spots = sorted(scanned.spots(spec.name, kind, whole))
            assert spots == sorted(with_index.spots(spec.name, kind, whole))
            assert sum(spot.box.numel for spot in spots) == whole.numel


def test_the_places_of_boxes_are_told_once(tmp_path):
    def saves(ranks: SimulatedRanks) -> list[int]:
        engine, sizes = PlainEngine(ranks, TABLE, 1), []
        live, writer = Live(engine, engine.parameters, ranks), SnapshotWriter(tmp_path, 1, None, total_steps=9)
        for step in (1, 2, 3):
            before = ranks.sent.nbytes
            writer.save(live, {"step": step})
            writer.wait()
            sizes.append(ranks.sent.nbytes - before)
        return sizes

    for (first, second, third), _ in on_simulated_ranks(4, saves)[1:]:
        assert second < first - 500 and third == second
