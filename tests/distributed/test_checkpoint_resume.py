"""Resume on the same layout is bitwise; on any other, masters and moments are, and the losses go on."""

from pathlib import Path

import pytest

from tests.distributed.checkpoint_engine import EngineCase, TinyEngine, close, unpadded_digest
from tests.harness import run_ranks
from tests.saving import save
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.checkpoint.deepspeed_state import Live
from zeropipe.trainer.checkpoint.loader import load
from zeropipe.trainer.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.distributed

STAGES = [(0, False), (1, False), (2, False), (3, False), (2, True), (3, True)]
MATRIX = [EngineCase(zero, world, offload) for world in (1, 2) for zero, offload in STAGES]
BEFORE, AFTER = 3, 2  # steps


def _train(layout: EngineCase, output: Path):
    """Trains, saves, trains on: what was held when it was saved, and the losses after it."""
    engine = TinyEngine(layout)
    for number in range(BEFORE):
        engine.step(number)
    assert all(norm > 0.3 for norm in engine.norms), "clipping must be active"
    path = save(Live(engine.deepspeed, engine.parameters, engine.ranks), output, {"step": BEFORE})
    held = engine.held()
    return path, held, [engine.step(number) for number in range(BEFORE, BEFORE + AFTER)], engine.held()


def _resume(layout: EngineCase, paths: list[Path]):
    """Loads one checkpoint after the other into one engine: what it held then, the losses, and what it held at last."""
    engine = TinyEngine(layout, seed=8)
    results = []
    for number, path in enumerate(paths):
        if number:
            engine.step(0)  # an engine in the midst of training, stage 3's small parameters gathered
        assert load(Live(engine.deepspeed, engine.parameters, engine.ranks), path)["step"] == BEFORE
        held = engine.held()
        results.append((held, [engine.step(n) for n in range(BEFORE, BEFORE + AFTER)], engine.held()))
    return results


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[EngineCase, tuple]:
    """One checkpoint of every layout."""
    root = tmp_path_factory.mktemp("sources")
    return {layout: run_ranks(layout.world, _train, layout, root / str(layout))[0] for layout in MATRIX}


@pytest.mark.parametrize("layout", MATRIX, ids=str)
def test_a_checkpoint_holds_what_deepspeed_holds(sources, layout):
    path, held, _, _ = sources[layout]
    checkpoint = Checkpoint.open(path)
    stored = {
        f"{kind}/{name}": unpadded_digest(checkpoint.read(name, kind), checkpoint.shape(name))
        for name in checkpoint.names()
        for kind in checkpoint.kinds(name)
    }
    assert stored == {key: value for key, value in held.items() if not key.startswith("model/")}
    assert len(stored) == 3 * len(checkpoint.names()) == 3 * 28


@pytest.mark.parametrize("layout", MATRIX, ids=str)
def test_the_same_layout_resumes_bitwise(sources, layout):
    path, held, losses, last = sources[layout]
    for result in run_ranks(layout.world, _resume, layout, [path]):
        assert result == [(held, losses, last)]


def _check_pairs(sources, target: EngineCase, others: list[EngineCase]) -> None:
    results = run_ranks(target.world, _resume, target, [sources[other][0] for other in others], timeout=280)[0]
    for other, (held, losses, _) in zip(others, results, strict=True):
        assert held == sources[other][1], f"{other} to {target}"
        assert close(losses, sources[other][2], 1e-6), f"{other} to {target}: {losses} for {sources[other][2]}"


@pytest.mark.parametrize("number", range(len(MATRIX)), ids=lambda number: str(MATRIX[number]))
def test_other_layouts_resume_exactly(sources, number):
    """Each from three others, and so that each is resumed on three others."""
    others = MATRIX[number + 1 :] + MATRIX[:number]
    _check_pairs(sources, MATRIX[number], others[::4])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MATRIX)), ids=lambda number: str(MATRIX[number]))
def test_all_pairs_of_layouts_resume_exactly(sources, number):
    _check_pairs(sources, MATRIX[number], MATRIX[number + 1 :] + MATRIX[:number])


VARIANTS = [
    EngineCase(1, 2, precision="bf16", family="llama"),
    EngineCase(2, 2, precision="bf16"),
    EngineCase(3, 2, precision="bf16", family="llama"),
    EngineCase(3, 2, offload=True, precision="bf16", scheduler=True),
    EngineCase(2, 1, offload=True, precision="bf16", scheduler=True),
    EngineCase(0, 2, precision="bf16"),  # masters in DeepSpeed's fp16 wrapper
    EngineCase(0, 2, family="llama", frozen=True, scheduler=True),
    EngineCase(1, 2, frozen=True),
    EngineCase(3, 2, family="llama", frozen=True, scheduler=True),
]


@pytest.mark.parametrize("layout", VARIANTS, ids=str)
def test_precisions_schedulers_and_frozen_parameters_resume_bitwise(tmp_path, layout):
    path, held, losses, last = run_ranks(layout.world, _train, layout, tmp_path)[0]
    assert run_ranks(layout.world, _resume, layout, [path])[0] == [(held, losses, last)]


DEEPSPEED_ADAMS = [
    EngineCase(1, 2, optimizer="deepspeed", scheduler=True),  # FusedAdam
    EngineCase(2, 2, offload=True, optimizer="deepspeed", precision="bf16"),  # CPUAdam
    EngineCase(3, 2, offload=True, optimizer="deepspeed", family="llama"),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", DEEPSPEED_ADAMS, ids=str)
def test_deepspeeds_own_adams_resume_bitwise(tmp_path, layout):
    """They are compiled when they are first used, and count their steps in an int."""
    path, held, losses, last = run_ranks(layout.world, _train, layout, tmp_path, timeout=600)[0]
    assert Checkpoint.open(path).state["engine"]["optimizer"] in ("FusedAdam", "DeepSpeedCPUAdam")
    assert run_ranks(layout.world, _resume, layout, [path], timeout=600)[0] == [(held, losses, last)]


def test_bf16_masters_survive_a_change_of_layout(tmp_path):
    layouts = [EngineCase(1, 2, precision="bf16"), EngineCase(3, 1, precision="bf16"), EngineCase(2, 2, True, "bf16")]
    sources = {layout: run_ranks(layout.world, _train, layout, tmp_path / str(layout))[0] for layout in layouts}
    for target in layouts:
        others = [layout for layout in layouts if layout is not target]
        results = run_ranks(target.world, _resume, target, [sources[other][0] for other in others])[0]
        for other, (held, losses, _) in zip(others, results, strict=True):
            assert held == sources[other][1], f"{other} to {target}"
            assert close(losses, sources[other][2], 1e-3), f"{other} to {target}: {losses} for {sources[other][2]}"


def test_moments_that_were_not_saved_are_not_made_up(tmp_path):
    """What was frozen has none: to go on training it from zeros would be another run, unsaid."""
    frozen = EngineCase(1, 2, frozen=True)
    path = run_ranks(2, _train, frozen, tmp_path)[0][0]
    for target in (EngineCase(1, 2), EngineCase(3, 2), EngineCase(0, 1)):
        said = run_ranks(target.world, _refused, target, path)
        assert len(set(said)) == 1 and "holds no exp_avg and no exp_avg_sq of transformer.wpe.weight" in said[0]


def _refused(layout: EngineCase, path: Path) -> str:
    engine = TinyEngine(layout)
    try:
        load(Live(engine.deepspeed, engine.parameters, engine.ranks), path)
    except UserError as error:
        return str(error)
    return "loaded"
