"""The writer: what is due, what it has published; and parameters of which only some are saved."""

import re

import pytest

from tests.distributed.torch_engine import GPT2, PlainEngine
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.checkpoint.deepspeed_state import Live
from zeropipe.trainer.checkpoint.loader import load
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.checkpoint.writer import CheckpointWriter, SnapshotWriter
from zeropipe.trainer.families.specs import parameter_table
from zeropipe.trainer.ranks.ranks import Ranks

TABLE = parameter_table(GPT2)[:6]


@pytest.mark.parametrize(("every", "due"), [(4, [4, 8, 10]), (None, [10]), (0, [10]), (5, [5, 10])])
def test_what_is_due(tmp_path, every, due):
    writer = SnapshotWriter(tmp_path, every, None, total_steps=10)
    assert [step for step in range(1, 11) if writer.due(step)] == due


def test_what_was_published_is_told_once_and_the_newest_stay(tmp_path):
    writer: CheckpointWriter = SnapshotWriter(tmp_path, 1, 2, total_steps=10)
    engine = PlainEngine(Ranks(), TABLE, 1)
    live = Live(engine, engine.parameters, engine.ranks)
    assert writer.poll() == []
    for step in (1, 2, 3):
        writer.save(live, {"step": step})
    names = [path.name for path in writer.wait()]
    assert names == ["step-00000001", "step-00000002", "step-00000003"] and writer.wait() == []
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == names[1:]


def test_only_the_parameters_that_are_named_are_saved_and_loaded(tmp_path):
    """As an adapter wants it: what it does not train is neither written nor expected."""
    writer = SnapshotWriter(tmp_path, 1, None, total_steps=1)
    engine = PlainEngine(Ranks(), TABLE, 1)
    some = engine.parameters[1:3]
    writer.save(Live(engine, some, engine.ranks), {"step": 1})
    (path,) = writer.wait()
    assert Checkpoint.open(path).names() == [name for name, _ in some]
    other = PlainEngine(Ranks(), TABLE, None)
    chosen = [(name, p) for name, p in other.parameters if name in dict(some)]
    load(Live(other, chosen, other.ranks), path)
    wrong = {name.partition("/")[2] for name in other.wrong(1)}
    assert wrong == {name for name, _ in other.parameters} - {name for name, _ in some}
    left_out = other.parameters[0][0]
    with pytest.raises(UserError, match=re.escape(f"{left_out} is not in the checkpoint")):
        load(Live(other, other.parameters, other.ranks), path)
