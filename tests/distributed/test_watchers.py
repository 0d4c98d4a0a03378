"""A run that looks after itself: it goes back past bad steps, keeps capsules to replay them, compares its replicas."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.test_bad_steps import _recipe, _train_spoilt, _weights
from tests.harness import run_ranks
from tests.tiny import _train, plan_of, tiny_json, tiny_store
from zeropipe.data_prep.errors import RankFault, UserError
from zeropipe.launcher.cli import main
from zeropipe.trainer.metrics.audit import audit
from zeropipe.trainer.metrics.reading import read_lines, read_metrics

pytestmark = pytest.mark.distributed

BAD, STEPS = 4, 6  # step 5 is spoilt; checkpoints of steps 2, 4 and 6
SAVE = {"save": {"every": 2, "keep": 10}, "duration": {"steps": STEPS}}
FEW = [pytest.param(name, marks=() if name in ("zero1", "zero3", "pipeline") else pytest.mark.slow) for name in (
    "zero0", "zero1", "zero2-bf16", "zero2-offload", "zero3", "pipeline", "tensor", "sequence")]  # fmt: skip
LAYOUTS = {
    "zero0": ("zero0", {}, {}),
    "zero1": ("zero1", {}, {}),
    "zero2-bf16": ("zero2", {"bf16": {"enabled": True}}, {}),
    "zero2-offload": ("zero2_offload", {}, {}),
    "zero3": ("zero3", {}, {}),
    "pipeline": ("zero1", {}, {"parallel": {"pipeline": 2}}),
    "tensor": ("zero1", {"tensor_parallel": {"autotp_size": 2}}, {}),
    "sequence": ("zero1", {"sequence_parallel_size": 2}, {}),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("data") / "store")


@pytest.mark.parametrize("layout", FEW)
def test_going_back_past_a_bad_step_is_never_having_taken_it(layout, store, tmp_path):
    """One step after the checkpoint: the run goes back over it, and ends where a run ends that only left it out."""
    zero, extra, sections = LAYOUTS[layout]
    ds, size = tiny_json(zero, **extra), 8
    runs = {kind: tmp_path / kind for kind in ("skip", "rewind")}
    for kind, output in runs.items():
        recipe = _recipe(store, output, on_bad_step=kind, **SAVE, **sections)
        assert run_ranks(2, _train_spoilt, recipe, ds, [BAD + 1], []) == [STEPS] * 2
    assert np.array_equal(_weights(runs["rewind"], STEPS), _weights(runs["skip"], STEPS))
    output = runs["rewind"]
    [back] = [record for record in read_metrics(output) if record.get("event") == "rewind"]
    assert (back["step"], back["samples"]) == (BAD, [(BAD + 1) * size, (BAD + 2) * size])
    taken = [record["step"] for record in read_lines(output) if record["kind"] == "train"]
    assert taken == [1, 2, 3, 4, 5, 5, 6]
    train = [record for record in read_metrics(output) if record["kind"] == "train"]
    assert [record.get("applied", True) for record in train] == [n != BAD + 1 for n in range(STEPS)]
    found = audit(output)
    assert found.defects == [] and found.steps == STEPS
    assert (output / "capsules" / f"step-{BAD + 2:08d}" / "capsule.json").is_file()


def test_what_was_gone_back_over_stays_left_out_after_a_restart(store, tmp_path):
    output, ds = tmp_path / "run", tiny_json("zero1")
    recipe = _recipe(store, output, on_bad_step={"type": "rewind", "leave_out": 2}, **SAVE)
    run_ranks(2, _train_spoilt, recipe, ds, [BAD + 1], [])
    before = _weights(output, STEPS)
    again = {**recipe, "resume": str(output / "checkpoints" / "step-00000002")}
    assert run_ranks(2, _train_spoilt, again, ds, [], [BAD, BAD + 1]) == [STEPS] * 2
    assert np.array_equal(_weights(output, STEPS), before)


def test_before_the_first_checkpoint_there_is_nowhere_to_go(store, tmp_path):
    recipe = _recipe(store, tmp_path / "run", on_bad_step="rewind", **SAVE)
    for said in run_ranks(2, _train_spoilt, recipe, tiny_json("zero1"), [1], []):
        assert "before the first checkpoint" in said and "samples 8 to 15" in said


def _train_jumping(recipe: dict, ds: dict, jumps: list[int]) -> str | int:
    """Trains; in these steps every label's loss is 4 nats more than it is."""
    from zeropipe.trainer.engine.zero import ZeroEngine

    def update(self, batch, step, weight, real=ZeroEngine._update):
        sums, norm = real(self, batch, step, weight)
        return sums + (4.0 * weight if step in jumps and self.ranks.is_main else 0.0), norm

    ZeroEngine._update = update  # type: ignore[method-assign]
    try:
        return _train(recipe, ds)
    except UserError as error:
        return str(error)


def test_a_loss_that_jumps(store, tmp_path):
    """Step 12 jumps, against eight steps before; a resumed run judges by what the checkpoint holds of them."""
    long = {"save": {"every": 5, "keep": 10}, "duration": {"steps": 13}}
    policy = {"type": "stop", "spike": 8.0, "window": 8}
    recipe = _recipe(store, tmp_path / "stop", on_bad_step=policy, **long)
    for said in run_ranks(2, _train_jumping, recipe, tiny_json("zero1"), [2, 11]):  # step 3 has too few before it
        assert said.startswith("step 12: the loss of ") and "8 robust deviations" in said and "zeropipe replay" in said
    state = json.loads((tmp_path / "stop/checkpoints/step-00000010/state.json").read_text())
    train = [record["loss"] for record in read_metrics(tmp_path / "stop") if record["kind"] == "train"]
    assert state["recent_losses"] == train[2:10]
    resumed = {**recipe, "on_bad_step": {**policy, "type": "rewind"}}
    assert run_ranks(2, _train_jumping, resumed, tiny_json("zero1"), [11]) == [13] * 2
    [back] = [record for record in read_metrics(tmp_path / "stop") if record.get("event") == "rewind"]
    assert back["step"] == 10 and back["samples"] == [88, 96]


def _train_flipped(recipe: dict, ds: dict, rank: int, name: str) -> str:
    """Trains; after step 3 one bit of one weight of one rank is another."""
    import os

    import torch

    from zeropipe.trainer.engine.replicas import Replicas

    def check(self, state, real=Replicas.check_if_due):
        if state.step == 3 and int(os.environ["RANK"]) == rank:
            weight = dict(self._engine.named_parameters())[name].data.view(-1)
            words = {2: torch.int16, 4: torch.int32}[weight.element_size()]
            weight.view(words)[5] ^= 1 << 9
        return real(self, state)

    Replicas.check_if_due = check  # type: ignore[method-assign]
    try:
        return str(_train(recipe, ds))
    except RankFault as error:
        return str(error)


@pytest.mark.parametrize(
    ("world", "layout", "rank", "name", "words"),
    [
        (3, "zero0", 2, "transformer.h.1.attn.c_attn.weight", "rank 2 on "),
        pytest.param(4, "zero1", 1, "transformer.wte.weight", "rank 1 on ", marks=pytest.mark.slow),
        pytest.param(4, "pipeline", 3, "transformer.h.1.mlp.c_fc.weight", "rank 1 on ", marks=pytest.mark.slow),
        (2, "tensor", 1, "transformer.ln_f.weight", "nobody can tell"),
        pytest.param(2, "zero2-bf16", 0, "transformer.wpe.weight", "nobody can tell", marks=pytest.mark.slow),
    ],
)
def test_a_flipped_bit_is_named(world, layout, rank, name, words, store, tmp_path):
    zero, extra, sections = LAYOUTS[layout]
    recipe = _recipe(store, tmp_path / "run", check_replicas=1, batch={"global": 2 * world}, **sections)
    found = run_ranks(world, _train_flipped, recipe, tiny_json(zero, **extra), rank, name)
    assert len(set(found)) == 1
    assert f"step 3: the copies of {name} are no longer the same" in found[0] and "step 2 or before" in found[0]
    if layout == "pipeline":
        assert "rank 2 on " in found[0] and "rank 3 on " in found[0] and "nobody can tell" in found[0]
    else:
        assert words in found[0]
    [failed] = [record for record in read_metrics(tmp_path / "run") if record.get("event") == "failed"]
    assert name in failed["error"]


@pytest.mark.parametrize("layout", FEW)
def test_replicas_of_a_healthy_run_agree(layout, store, tmp_path):
    zero, extra, sections = LAYOUTS[layout]
    world = 4 if layout == "pipeline" else 2
    recipe = _recipe(store, tmp_path / "run", check_replicas=1, duration={"steps": 3}, **sections)
    if layout == "zero3":
        with pytest.raises(UserError, match="check_replicas with ZeRO-3"):
            plan_of(recipe, tiny_json(zero), world)
        return
    assert run_ranks(world, _train, recipe, tiny_json(zero, **extra)) == [3] * world


def test_how_the_ranks_fared_is_on_record(store, tmp_path):
    recipe = _recipe(store, tmp_path / "run", log={"every": 2}, duration={"steps": 4})
    run_ranks(2, _train_slow, recipe, tiny_json("zero1"))
    train = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert ["hosts" in record for record in train] == [False, True, False, True]
    record = train[-1]
    assert record["slowest_rank"] == 1 and record["slowest_forward_seconds"] > 0.4
    assert record["slowest_forward_seconds"] > record["median_forward_seconds"]
    [(host, worst)] = record["hosts"].items()
    assert host and worst["forward_seconds"] == record["slowest_forward_seconds"]
    assert worst["memory"] == record["most_memory"] > 1e8 and worst["host_memory"] > worst["memory"]


def _train_slow(recipe: dict, ds: dict) -> int:
    """Rank 1 takes 0.1 s longer over each block of each of its micro batches."""
    import os

    from torch.nn import GELU

    def forward(self, inputs, real=GELU.forward):
        time.sleep(0.1 * (os.environ["RANK"] == "1"))
        return real(self, inputs)

    GELU.forward = forward  # type: ignore[method-assign]
    return _train(recipe, ds)


@pytest.mark.parametrize(
    "layout",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2-offload", "pipeline", "tensor", "sequence")),
        "zero3",
    ],
)
def test_the_slowest_rank_where_all_wait_for_it(layout, store, tmp_path):
    """The other one spends as long in its forward pass; what counts is in what."""
    zero, extra, sections = LAYOUTS[layout]
    recipe = _recipe(store, tmp_path / "run", log={"every": 2}, duration={"steps": 2}, **sections)
    run_ranks(2, _train_slow, recipe, tiny_json(zero, **extra))
    *_, record = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert record["slowest_rank"] == 1
    assert record["slowest_forward_seconds"] > 0.2
    # of two ranks the median is the mean: the other one took less than half as long
    assert record["median_forward_seconds"] < 0.75 * record["slowest_forward_seconds"]


def test_a_run_is_asked_for_a_checkpoint_and_to_stop(store, tmp_path, capsys):
    output = tmp_path / "run"
    recipe = _recipe(store, output, duration={"steps": 5000}, save={"every": 0})
    done: list = []
    thread = threading.Thread(target=lambda: done.extend(run_ranks(2, _train, recipe, tiny_json("zero1"))))
    thread.start()
    while not (output / "metrics.jsonl").exists():
        time.sleep(0.1)
    assert main(["ckpt", "request", str(output)]) == 0
    ends = time.monotonic() + 60
    while not (saved := list(output.glob("checkpoints/step-*/manifest.json"))) and time.monotonic() < ends:
        time.sleep(0.1)
    assert main(["ckpt", "request", str(output), "--stop"]) == 0
    thread.join()
    assert saved and len(set(done)) == 1 and done[0] < 5000
    assert (output / "checkpoints" / f"step-{done[0]:08d}").is_dir()
    capsys.readouterr()
    assert main(["ckpt", "request", str(output), "--wait", "0.2"]) == 2
    assert "no run took notice" in capsys.readouterr().err and not (output / ".request").exists()
