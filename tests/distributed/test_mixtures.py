"""What balances the experts of a mixture: against formulas written down here, and the same on every layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.harness import run_ranks
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.testing.curves import plain_model, whole_batch

pytestmark = pytest.mark.distributed

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
MIXTRAL = {"model_type": "mixtral", **SIZES, "num_local_experts": 8}
GLM = {
    "model_type": "glm4_moe",
    **SIZES,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}


def shared(size: int) -> dict[str, Any]:
    return {"expert_parallel": {"enabled": True, "autoep_size": size}}


ROUTER = {"aux_loss": 0.05, "z_loss": 0.01}
SAMPLE = [
    ("mixtral", "zero3-checkpointing"), ("sft", "zero2-micro1"), ("bias", "zero1-micro4"), ("mixtral", "sp2"),
    ("mixtral", "tp2"), ("mixtral", "ep2-zero2"), ("bias", "ep2-dp2-zero3"),
]  # fmt: skip
# micro batch and ranks differ, accumulation follows; the rows are not as long as each other's labels
LAYOUTS: dict[str, tuple[int, str, int, dict[str, Any]]] = {
    "zero1-micro4": (2, "zero1", 4, {}),
    "zero2-micro1": (2, "zero2", 1, {}),
    "zero3-checkpointing": (2, "zero3", 2, {"activation_checkpointing": {}}),
    "zero3-offload": (2, "zero3_offload", 2, {}),
    "sp2": (2, "zero1", 2, {"sequence_parallel_size": 2}),
    "tp2": (2, "zero1", 2, {"tensor_parallel": {"autotp_size": 2}}),
    "sp2-zero3": (4, "zero3", 1, {"sequence_parallel_size": 2}),
    "tp2-zero2": (4, "zero2", 1, {"tensor_parallel": {"autotp_size": 2}}),
    "ep2-zero1": (2, "zero1", 4, shared(2)),
    "ep2-zero2": (2, "zero2", 2, shared(2)),
    "ep2-zero3-checkpointing": (2, "zero3", 2, {**shared(2), "activation_checkpointing": {}}),
    "ep2-zero2-offload": (2, "zero2_offload", 2, shared(2)),
    "ep2-zero3-offload": (2, "zero3_offload", 2, shared(2)),
    "ep2-sp2-zero3": (2, "zero3", 4, {**shared(2), "sequence_parallel_size": 2}),
    "ep4-sp2-zero2": (4, "zero2", 2, {**shared(4), "sequence_parallel_size": 2}),
    "ep2-dp2-zero1": (4, "zero1", 2, shared(2)),
    "ep2-dp2-zero2": (4, "zero2", 1, shared(2)),
    "ep2-dp2-zero3": (4, "zero3", 2, shared(2)),
    "ep4-zero1": (4, "zero1", 2, shared(4)),
    "ep4-zero2": (4, "zero2", 1, shared(4)),
    "ep4-zero3": (4, "zero3", 2, shared(4)),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixtures")
    return {"text": tiny.tiny_store(folder / "text"), "sft": tiny.tiny_records(folder / "sft")}


def records_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["kind"] == "train"]


def expected(recipe: dict[str, Any], ds: dict[str, Any]) -> list[dict[str, Any]]:
    """Every step by transformers' model on the whole global batch: losses by the papers' formulas, loads counted."""
    from zeropipe.trainer.engine.base import planned_rate
    from zeropipe.trainer.ranks.ranks import init_distributed
    from zeropipe.trainer.run.data import RunData
    from zeropipe.trainer.testing.plain import decayed_groups

    plan, ranks, found = tiny.plan_of(recipe, ds, 1), init_distributed(), []
    router, params = recipe["model"]["router"], plan.deepspeed["optimizer"]["params"]
    model = plain_model(plan)
    said: list[Any] = []
    gates = [module for name, module in model.named_modules() if type(module).__name__.lower().endswith("topkrouter")]
    for gate in gates:
        gate.register_forward_hook(lambda _m, _i, output: said.append(output))
    sigmoid = recipe["model"]["config"]["model_type"] == "glm4_moe"
    groups = decayed_groups(model.parameters(), params["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=params["lr"], betas=tuple(params["betas"]), eps=params["eps"])
    with RunData.open(plan).stream(ranks) as stream:
        for step in range(plan.total_steps):
            for group in optimizer.param_groups:
                group["lr"] = planned_rate(plan, step)
            ids, labels, positions = whole_batch(stream.next_step(), ranks.device)
            said.clear()
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            kept = labels >= 0
            loss = F.cross_entropy(logits[kept], labels[kept])
            aux = z = torch.zeros(())
            loads = []
            for scores, _, chosen in said:
                scores, chosen = scores.view(*labels.shape, -1), chosen.view(*labels.shape, -1)
                experts, each = scores.shape[-1], chosen.shape[-1]
                loads.append(torch.bincount(chosen[kept].flatten(), minlength=experts))
                for row, own in enumerate(kept):
                    s = scores[row][own].sigmoid() if sigmoid else scores[row][own].softmax(-1)
                    p = (s / s.sum(-1, keepdim=True)).mean(0)
                    f = torch.bincount(chosen[row][own].flatten(), minlength=experts) * experts / (each * own.sum())
                    aux = aux + (f * p).sum() * own.sum() / kept.sum()
                z = z + scores[kept].logsumexp(-1).square().mean()
            loss = loss + router.get("aux_loss", 0) * aux + router.get("z_loss", 0) * z
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), plan.settings.clipping))
            optimizer.step()
            optimizer.zero_grad()
            for gate, load in zip(gates, loads, strict=True):
                if rate := router.get("bias_update"):
                    gate.e_score_correction_bias += rate * (load.float().mean() - load).sign()
            biases = [getattr(gate, "e_score_correction_bias", torch.zeros(0)).tolist() for gate in gates]
            sums = {"aux": aux.item() / len(gates), "z": z.item() / len(gates), "loads": torch.stack(loads).tolist()}
            found.append({"loss": loss.item(), "grad_norm": norm, **sums, "biases": biases})
    return found


@functools.cache
def truth(case: str, store: Path, steps: int) -> list[dict[str, Any]]:
    recipe = case_of(case, store, store.parent / f"truth-{case}", steps)
    return run_ranks(1, expected, recipe, tiny.tiny_json(micro=8), timeout=600)[0]


def case_of(case: str, store: Path, run: Path, steps: int) -> dict[str, Any]:
    config, router, sections = {
        "mixtral": (MIXTRAL, ROUTER, {"data": {"document_mask": True}}),
        "sft": (MIXTRAL, ROUTER, {"objective": "sft", "data": {"packing": "none"}}),  # padding and prompts: no labels
        "bias": (GLM, {**ROUTER, "bias_update": 0.01}, {}),
    }[case]
    model = {"config": config, "router": router}
    return tiny.tiny_recipe(store, run, model=model, duration={"steps": steps}, log={"every": 5}, **sections)


def assert_follows(case: str, store: Path, run: Path, layout: str, steps: int) -> None:
    world, zero, micro, ds = LAYOUTS[layout]
    run_ranks(world, tiny._train, case_of(case, store, run, steps), tiny.tiny_json(zero, micro, **ds), timeout=600)
    ours, theirs = records_of(run), truth(case, store, steps)
    assert len(ours) == len(theirs) == steps
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6), one["step"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5), one["step"]
        assert one["router/aux_loss"] == pytest.approx(other["aux"], rel=1e-6)
        assert one["router/z_loss"] == pytest.approx(other["z"], rel=1e-5)
        loads = torch.tensor(other["loads"], dtype=torch.float64)
        shares = loads / loads.sum(1, keepdim=True)
        width = shares.shape[1]
        entropy = torch.special.entr(shares).sum(1) / torch.tensor(float(width)).log()
        assert one["router/load_entropy"] == pytest.approx(entropy.mean().item(), rel=1e-6)
        assert one["router/load_max"] == pytest.approx((shares.amax(1) * width).mean().item(), rel=1e-9)
        assert one["router/unused"] == int((loads == 0).sum())
        assert ("router/load" in one) == (one["step"] % 5 == 0 or one["step"] == 1)
        if "router/load" in one:
            torch.testing.assert_close(torch.tensor(one["router/load"], dtype=torch.float64), shares)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "layout"), SAMPLE)
def test_a_sample_follows_the_formulas(case, layout, stores, tmp_path):
    assert_follows(case, stores["sft" if case == "sft" else "text"], tmp_path / "run", layout, 5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["mixtral", "sft", "bias"])
def test_twenty_steps_follow_the_formulas_on_every_layout(case, layout, stores, tmp_path):
    store = stores["sft" if case == "sft" else "text"]
    assert_follows(case, store, tmp_path / "run", layout, 20)
    if case == "bias":
        checkpoint, (last, *_) = Checkpoint.open(tmp_path / "run"), truth(case, store, 20)[-1]["biases"]
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        assert checkpoint.read(name).tolist() == last and len(set(last)) > 2
