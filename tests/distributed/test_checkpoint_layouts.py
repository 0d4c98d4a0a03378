"""Tensor-, pipeline-, sequence-parallel and 3-D layouts: any writes, any reads, all bits the same."""

from pathlib import Path

import pytest
import torch

from tests.distributed.torch_engine import GPT2, KINDS, LLAMA, PlainEngine, known
from tests.harness import run_ranks
from tests.saving import save
from zeropipe.trainer.checkpoint.deepspeed_state import Live
from zeropipe.trainer.checkpoint.loader import load
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.families.specs import parameter_table
from zeropipe.trainer.ranks.ranks import init_distributed

pytestmark = pytest.mark.distributed

# tensor, sequence, pipeline, data
LAYOUTS = [(1, 1, 1, 1), (2, 1, 1, 1), (4, 1, 1, 1), (1, 1, 2, 1), (2, 1, 2, 1), (1, 1, 2, 2), (1, 2, 1, 2)]
VERSION = 3


def _save(config: dict, layout: tuple, output: Path):
    tensor, sequence, pipeline, _ = layout
    engine = PlainEngine(init_distributed(tensor, sequence, pipeline), parameter_table(config, tensor), VERSION)
    return save(Live(engine, engine.parameters, engine.ranks), output, {"step": 10})


def _load(config: dict, layout: tuple, paths: list[Path]):
    tensor, sequence, pipeline, _ = layout
    ranks = init_distributed(tensor, sequence, pipeline)
    wrong = []
    for path in paths:
        engine = PlainEngine(ranks, parameter_table(config, tensor), None)
        load(Live(engine, engine.parameters, ranks), path)
        wrong.append(engine.wrong(VERSION))
        group = engine.optimizer.param_groups[0]
        assert (group["lr"], engine.global_steps) == (1e-3, VERSION)
        assert {float(state["step"]) for state in engine.optimizer.state.values()} == {7.0}
    return wrong


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_any_layout_reads_what_any_other_wrote(tmp_path, config):
    paths = []
    for number, layout in enumerate(LAYOUTS):
        world = torch.tensor(layout).prod().item()
        paths.append(run_ranks(world, _save, config, layout, tmp_path / str(number))[0])
        checkpoint = Checkpoint.open(paths[-1])
        table = parameter_table(config)
        assert checkpoint.names() == sorted(spec.name for spec in table)
        for spec in table:
            assert checkpoint.shape(spec.name) == spec.shape
            for kind in KINDS:
                assert torch.equal(checkpoint.read(spec.name, kind), known(spec, kind, VERSION)), (layout, spec.name)
        stored = sum(file.stat().st_size for file in paths[-1].glob("rank-*"))
        needed = 4 * 3 * sum(torch.tensor(spec.shape).prod().item() for spec in table)
        assert needed < stored < 1.5 * needed + 20_000 * world, "everything is stored once (and a header)"
    for layout in LAYOUTS:
        for wrong in run_ranks(torch.tensor(layout).prod().item(), _load, config, layout, paths):
            assert wrong == [[]] * len(paths), layout
