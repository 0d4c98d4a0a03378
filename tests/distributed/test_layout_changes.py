"""Runs that are resumed, on other layouts and on their own, through the loop and its checkpoints."""

from __future__ import annotations

import pytest

from tests import tiny
from zeropipe.trainer.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.distributed

TENSOR = {"tensor_parallel": {"autotp_size": 2}}
# (ranks, pipeline stages, JSON, ZeRO): every kind of layout comes after and before another kind
LAYOUTS = [
    (2, 1, TENSOR, "zero2"),
    (2, 2, {}, "zero1"),
    (4, 2, TENSOR, "zero1"),
    (2, 1, {"sequence_parallel_size": 2}, "zero3"),
    (2, 1, TENSOR, "zero3"),
    (4, 2, {}, "zero1"),
    (1, 1, {}, "zero0"),
]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({**tiny.GPT2, **tiny.NO_DROPOUT}, id="gpt2", marks=pytest.mark.slow),
        pytest.param(tiny.LLAMA, id="llama"),
    ],
)
def test_a_run_that_changes_its_layout_after_every_step(model, tmp_path):
    store = tiny.tiny_store(tmp_path / "store")
    same = {"model": {"config": model}, "schedule": {"type": "constant", "warmup": 0}, "save": {"every": 1}}

    def train(output: str, steps: int, ranks: int, stages: int, extra: dict, zero: str):
        recipe = tiny.tiny_recipe(
            store, tmp_path / output, duration={"steps": steps}, parallel={"pipeline": stages}, **same
        )
        return tiny.train_on_ranks(ranks, recipe, tiny.tiny_json(zero, 2, **extra))

    steady = train("steady", len(LAYOUTS), 1, 1, {}, "zero1")
    for step, layout in enumerate(LAYOUTS):
        changing = train("changing", step + 1, *layout)
    assert len(changing["loss"]) == len(LAYOUTS)
    assert changing["loss"] == pytest.approx(steady["loss"], rel=1e-6)
    assert changing["grad_norm"] == pytest.approx(steady["grad_norm"], rel=1e-5)
    assert changing["ledger"] == steady["ledger"] and changing["samples"] == steady["samples"]
    assert changing["lr"] == steady["lr"]


def _bytes(run) -> dict[tuple[str, str], bytes]:
    checkpoint = Checkpoint.open(run)
    kinds = "master", "exp_avg", "exp_avg_sq"
    return {
        (name, kind): checkpoint.read(name, kind).numpy().tobytes() for name in checkpoint.names() for kind in kinds
    }


@pytest.mark.parametrize(
    ("ranks", "stages", "extra", "zero"),
    [
        pytest.param(2, 1, {"sequence_parallel_size": 2}, "zero2", id="sp2"),
        pytest.param(4, 2, TENSOR, "zero1", id="pp2-tp2"),
        pytest.param(2, 2, {}, "zero1", id="pp2", marks=pytest.mark.slow),
        pytest.param(4, 1, TENSOR, "zero3", id="tp2-dp2", marks=pytest.mark.slow),
        pytest.param(4, 2, {}, "zero1", id="pp2-dp2", marks=pytest.mark.slow),
    ],
)
def test_a_resume_on_the_same_layout_is_the_same_bit_for_bit(ranks, stages, extra, zero, tmp_path):
    """With dropout, accumulation and clipping at work."""
    store = tiny.tiny_store(tmp_path / "store")
    dropout = {"model": {"config": {**tiny.GPT2, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}}}

    def train(output: str, steps: int):
        sections = {"duration": {"steps": steps}, "schedule": {"type": "constant", "warmup": 0}}
        recipe = tiny.tiny_recipe(store, tmp_path / output, parallel={"pipeline": stages}, **sections, **dropout)
        return tiny.train_on_ranks(ranks, recipe, tiny.tiny_json(zero, 2, **extra))

    whole = train("whole", 4)
    train("halves", 2)
    halves = train("halves", 4)
    assert halves == whole
    assert _bytes(tmp_path / "halves") == _bytes(tmp_path / "whole")
