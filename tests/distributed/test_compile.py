"""`compile: blocks` trains as without it on every kind of layout, and compiles one block however many there are."""

import json

import pytest

from tests import tiny
from tests.distributed import layouts, reference
from tests.distributed.reference import gpt2, llama
from tests.harness import run_ranks
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.kernels.compiled import check_compiler
from zeropipe.trainer.plan.layout import Layout

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "zero1": Layout(2, 2, zero_stage=1),
    "zero3": Layout(2, 2, zero_stage=3),
    "tensor": Layout(2, 1, tensor=2),
    "sequence": Layout(2, 1, sequence=2, zero_stage=1),
    "pipeline": Layout(2, 1, pipeline=2, zero_stage=1),
}
CASES = [
    pytest.param(config, layout, kept, id=f"{name}-{layout}-{kept}", marks=[] if fast else pytest.mark.slow)
    for name, config in (("gpt2", gpt2()), ("llama", llama()))
    for layout in LAYOUTS
    for kept in ("kept", "recomputed")
    for fast in [(name, layout, kept) == ("llama", "pipeline", "recomputed")]
]


def _graphs(config: dict, layout: Layout, kept: str):
    from torch._dynamo.utils import counters

    ds = {} if kept == "kept" else {"activation_checkpointing": {}}
    curve = layouts.train(config, layout, compile="blocks", **ds)
    return curve, counters["stats"]["unique_graphs"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("config", "layout", "kept"), CASES)
def test_it_trains_as_without(config: dict, layout: str, kept: str):
    truth = reference.truth(config, layouts.STEPS)
    curves, graphs = zip(*run_ranks(2, _graphs, config, LAYOUTS[layout], kept, timeout=800), strict=True)
    reference.assert_same(curves[0], truth)
    assert max(graphs) > 0, "nothing was compiled"


def test_twelve_blocks_are_compiled_as_one():
    few, many = (
        run_ranks(1, _graphs, llama(num_hidden_layers=layers), Layout(1, 1), "kept")[0][1] for layers in (2, 12)
    )
    assert few == many > 0


def test_the_warm_up_is_told(tmp_path):
    store = tiny.tiny_store(tmp_path / "store")
    recipe = tiny.tiny_recipe(store, tmp_path / "run", compile="blocks")
    assert tiny.train_on_ranks(1, recipe, tiny.tiny_json("zero1"))["step"] == 6
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (told,) = [record for record in records if record.get("event") == "compiled"]
    assert told["step"] == 2
    assert told["first_step_seconds"] > told["second_step_seconds"] > 0


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"compile: blocks needs a C\+\+ compiler, and there is no no-such-compiler"):
        check_compiler("cpu")
