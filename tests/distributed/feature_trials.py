"""DeepSpeed's own levers, tried: what is proven trains as without it (or as plain torch), what is not is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import tiny
from tests.distributed.legality_table import Plain
from zeropipe.data_prep.errors import UserError


@dataclass(frozen=True)
class Lever:
    """A key of the DeepSpeed JSON. `test` proves it more closely; without one, plans are to refuse it."""

    key: str
    what: str
    ds: dict[str, Any]  # the sections that ask for it
    test: str | None = None
    zero: str = "zero3"
    world: int = 2
    recipe: dict[str, Any] = field(default_factory=dict)


def _zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **options}}


def _type(name: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": name, **({"params": params} if params else {})}}


_MUON = {"recipe": {"optimizer": {"lr": 1e-3, "muon_lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}}}
_NVME = {"device": "nvme", "nvme_path": "/nvme"}
_HPZ = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
ON = {"enabled": True}

LEVERS = (
    *(
        Lever(f"optimizer.type Muon, {zero}", "orthogonalised momentum for matrices", _type("Muon"), "test_muon.py",
              zero, **_MUON)
        for zero in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    ),
    Lever("zero_optimization.zero_hpz_partition_size", "a second partition of the parameters, within hosts",
          _zero(**_HPZ), "test_hpz.py", world=4),
    Lever("wall_clock_breakdown", "time of forward, backward, update", {"wall_clock_breakdown": True},
          "test_instruments.py"),
    Lever("comms_logger", "calls, bytes and time of communication", {"comms_logger": {**ON, "prof_all": True}},
          "test_instruments.py"),
    Lever("flops_profiler", "arithmetic of the forward pass", {"flops_profiler": {**ON, "profile_step": 2}},
          "test_instruments.py"),
    Lever("optimizer.params.foreach", "torch's AdamW by lists of tensors, not the fused one",
          _type("AdamW", foreach=True), "test_fused_adam.py"),
    Lever("zero_optimization.offload_optimizer.device nvme", "optimizer states on a disk",
          _zero(offload_optimizer=_NVME)),
    Lever("zero_optimization.offload_param.device nvme", "parameters on a disk", _zero(offload_param=_NVME)),
    Lever("zero_optimization.zero_quantized_weights", "qwZ: gathers parameters in 8 bits",
          _zero(zero_quantized_weights=True)),
    Lever("zero_optimization.zero_quantized_gradients", "qgZ: reduces gradients in 4 bits",
          _zero(zero_quantized_gradients=True)),
    Lever("zero_optimization.zenflow", "updates in the background", _zero(zenflow={"topk_ratio": 0.1})),
    Lever("zero_optimization.offload_optimizer.super_offload", "updates speculatively on the host",
          _zero(offload_optimizer={"device": "cpu", "super_offload": True})),
    Lever("zero_optimization.offload_optimizer.ratio", "a part of the update on the host",
          _zero(offload_optimizer={"device": "cpu", "ratio": 0.5})),
    Lever("zero_optimization.mics_shard_size", "MiCS: parameters cut within hosts", _zero(mics_shard_size=2)),
    Lever("compile.deepcompile", "compiles the engine's step", {"compile": {"deepcompile": True}}),
    Lever("expert_parallel.top_k", "AutoEP's own layers of experts", {"expert_parallel": {"top_k": 2}}),
    Lever("datastates_ckpt", "checkpoints in the background", {"datastates_ckpt": {"host_cache_size": 1}}),
    Lever("checkpoint.writer", "checkpoints in the background", {"checkpoint": {"writer": {"type": "FAST"}}}),
    Lever("autotuning", "searches for a micro batch", {"autotuning": ON}),
    Lever("data_efficiency", "curriculum of samples", {"data_efficiency": ON}),
    Lever("elasticity", "changes of the number of ranks", {"elasticity": ON}),
    Lever("hybrid_engine", "generation between steps", {"hybrid_engine": ON}),
    Lever("compression_training", "pruning and quantisation", {"compression_training": {"x": {}}}),
    Lever("weight_quantization", "weights in few bits", {"weight_quantization": {"quantized_initialization": {}}}),
    Lever("curriculum_learning", "curriculum of lengths", {"curriculum_learning": ON}),
    Lever("progressive_layer_drop", "drops layers", {"progressive_layer_drop": ON}),
    Lever("optimizer.type OneBitAdam", "gradients in one bit", _type("OneBitAdam")),
    Lever("optimizer.type ZeroOneAdam", "gradients in one bit", _type("ZeroOneAdam")),
    Lever("optimizer.type OneBitLamb", "gradients in one bit", _type("OneBitLamb")),
    Lever("optimizer.type Lamb", "rates by layers", _type("Lamb")),
)  # fmt: skip


def json_of(lever: Lever, with_it: bool = True) -> dict[str, Any]:
    ds = tiny.tiny_json(lever.zero, micro=1)
    if lever.ds.get("optimizer", {}).get("type") == "Muon":
        del ds["gradient_clipping"]
    return {**ds, **lever.ds} if with_it else ds


def refusal(lever: Lever, store: Path) -> str | None:
    """What a plan says of it; None where it is accepted."""
    try:
        tiny.plan_of(tiny.tiny_recipe(store, store.parent / "run", **lever.recipe), json_of(lever), lever.world)
    except UserError as error:
        return str(error)
    return None


def tried(lever: Lever, folder: Path) -> Plain:
    """Trains with and without it, or as plain torch does, and says how far apart the losses are."""
    from tests.distributed import test_muon

    recipe = tiny.tiny_recipe(folder / "store", folder / "with", **lever.recipe)
    found = tiny.train_on_ranks(lever.world, recipe, json_of(lever))["loss"]
    bare = {**recipe, "output": str(folder / "without")}
    if "Muon" in lever.key:
        known = test_muon.plain(bare).losses
    else:
        known = tiny.train_on_ranks(lever.world, bare, json_of(lever, with_it=False))["loss"]
    apart = max(abs(one / other - 1) for one, other in zip(found, known, strict=True))
    against = "plain torch" if "Muon" in lever.key else "without it"
    return Plain(lever.key, "works" if apart <= 1e-6 else "differs", f"losses within {apart:.0e} of {against}")


def trials(folder: Path) -> Iterator[Plain]:
    """Every lever: proven by a trial, or refused in the plan's own words."""
    for number, lever in enumerate(LEVERS):
        own = folder / str(number)
        tiny.tiny_store(own / "store")
        said = refusal(lever, own / "store")
        yield Plain(lever.key, "raises", said) if said is not None else tried(lever, own)


def page(found: list[Plain], versions: str) -> str:
    lines = [
        "# DeepSpeed's own levers",
        "",
        f"Written by `scripts/features.py` from trials on CPUs with {versions}; not by hand.",
        "What is proven was trained for a few steps on 2 or 4 gloo ranks and compared; the test named beside it looks",
        "closer (checkpoints, resumes, layouts). What is refused is refused by `zeropipe plan`, in the words given",
        "here, and `tests/unit/trainer/plan/test_features.py` holds it to them.",
        "",
        "| key | what it does | | how it was tried, or what `plan` says |",
        "|---|---|---|---|",
    ]
    for lever, row in zip(LEVERS, found, strict=True):
        assert lever.key == row.name
        proven = row.outcome == "works"
        test = f"; `tests/distributed/{lever.test}`" if proven else ""
        verdict = "**proven**" if proven else "refused" if row.outcome == "raises" else "**WRONG**"
        lines.append(
            f"| `{lever.key}` | {lever.what} | {verdict} | {row.detail.replace('DeepSpeed JSON: ', '')}{test} |"
        )
    return "\n".join([*lines, "", *NOTES]) + "\n"


NOTES = (
    "## Notes",
    "",
    "- **Muon** gets the linears of the blocks, by the family's table; embeddings, head, norms and biases get AdamW.",
    "  DeepSpeed's iteration (`ns_method: gram`) runs in fp32 on CPUs, where only rounding separates it from plain",
    "  torch, and in fp16 on GPUs; `standard` runs in bf16. `torch.optim.Muon` always iterates in bf16, which alone",
    "  moves the loss by 2e-5 and the weights by 1.5e-2 in 20 steps. DeepSpeed clips the finished updates, not the",
    "  gradients: gradient_clipping is refused, and its norm is not recorded. GPT-2 stores its linears [in, out], so",
    "  that the factor sqrt(max(1, rows / columns)) of its updates is that of the transpose. The trials accumulate",
    "  gradients, which ZeRO-3 once got wrong (DeepSpeed's report 8443); and matrices are told by the table, where",
    "  DeepSpeed once took none for a matrix under zero.Init (8438).",
    "- **NVMe** was not tried: `async_io` had not finished compiling after 500 s on a busy machine, and checkpoints do",
    "  not read through DeepSpeed's swapping getters. So plans refuse it.",
    "- **Fused AdamW** is the default on CPUs: 15 ms a step for 30 million fp32 elements on one core, where foreach",
    "  takes 105 and torch's default 151; elements differ by 2e-7 at most after five steps. DeepSpeedCPUAdam takes 14,",
    "  differs by 1e-6, and must first be compiled (96 s here): state `torch_adam: false` for it.",
    "- **wall_clock_breakdown, comms_logger, flops_profiler**: their figures are an event `profile` at the end of",
    "  metrics.jsonl, and in `zeropipe report`; the profiler's table is RUN/flops_profile.txt. The breakdown",
    "  synchronises the device; the logger counts what goes through deepspeed.comm, our own reductions excepted.",
)
