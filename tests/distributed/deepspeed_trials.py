"""What plain DeepSpeed does with settings that our engines replace or that plans refuse, for the record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.distributed import reference
from tests.distributed.legality_table import Combination, Plain
from tests.distributed.legality_trials import HANGS, MARK, MODEL, STEPS, differences, judge, train_trial
from tests.distributed.reference import BETAS, CLIP, DECAY, LR, Curve, gpt2, llama
from tests.harness import RankFailed, RankGroup
from zeropipe.trainer.ranks.ranks import init_distributed

MODELS = {"GPT-2": gpt2(), "Llama": llama()}
# settings of zero_optimization, each on the simplest layout that it concerns
SETTINGS: tuple[tuple[str, Combination, dict[str, Any]], ...] = (
    ("pipeline 2 x data 2, ZeRO-1, overlap_comm", Combination(pipeline=2, data=2, stage=1), {"overlap_comm": True}),
    ("data 2, ZeRO-2, overlap_comm", Combination(data=2, stage=2), {"overlap_comm": True}),
    ("data 2, ZeRO-2, round_robin_gradients", Combination(data=2, stage=2), {"round_robin_gradients": True}),
    ("data 2, ZeRO-2, reduce_scatter false", Combination(data=2, stage=2), {"reduce_scatter": False}),
    ("data 2, ZeRO-2, contiguous_gradients false", Combination(data=2, stage=2), {"contiguous_gradients": False}),
    ("data 2, ZeRO-3, zero_quantized_weights", Combination(data=2, stage=3), {"zero_quantized_weights": True}),
    ("data 2, ZeRO-3, zero_hpz_partition_size 2", Combination(data=2, stage=3), {"zero_hpz_partition_size": 2}),
    ("data 2, ZeRO-1, compute_grad_norm false, no clipping", Combination(data=2, stage=1, clipping=False),
     {"compute_grad_norm": False}),
)  # fmt: skip


def deepspeed_trials(known: dict[bool, Curve], timeout: float = 90) -> Iterator[Plain]:
    """Every one of them, in processes of its own."""
    for precision, clipping in (("fp32", True), ("fp32", False), ("bf16", True)):
        combination = Combination(pipeline=2, stage=0, precision=precision, clipping=clipping)
        yield _try(
            f"{combination}, stage 0 left as it is", precision, timeout, 2, as_written, combination, known[clipping]
        )
    for name, combination, settings in SETTINGS:
        truth = known[combination.clipping]
        yield _try(name, combination.precision, timeout, combination.world, with_settings, combination, settings, truth)
    for model, config in MODELS.items():
        truth = known[True] if config == MODEL else reference.truth(config, STEPS)
        for stage in range(4):
            yield _try(f"AutoTP 2, {model}, ZeRO-{stage}", "fp32", timeout, 2, autotp, config, stage, truth)


def _try(name: str, precision: str, timeout: float, world: int, function: Callable, *arguments: Any) -> Plain:
    group = RankGroup(world, marked, function, *arguments)
    try:
        apart = group.results(timeout)[0]
    except RankFailed as error:
        text = str(error)
        if MARK in text:
            return Plain(name, "raises", json.loads(text.rsplit(MARK, 1)[1]))
        hung = "did not finish" in text
        return Plain(name, "hangs" if hung else "raises", HANGS if hung else text.splitlines()[0])
    finally:
        group.kill()
    return Plain(name, *judge(precision, apart))


def marked(function: Callable[..., dict], *arguments: Any) -> dict[str, Any]:
    from tests.distributed.legality_trials import first_line
    from zeropipe.trainer.run.quiet import quiet

    quiet()
    try:
        return {"ignored": [], **function(*arguments)}
    except Exception as error:
        raise RuntimeError(MARK + json.dumps(first_line(error))) from None


def as_written(combination: Combination, known: Curve) -> dict[str, Any]:
    """Our stages with the ZeRO stage that the JSON states: the engine itself tells DeepSpeed 1 where it says 0."""
    import deepspeed

    initialize = deepspeed.initialize

    def unchanged(config: dict[str, Any], **arguments: Any) -> Any:
        config["zero_optimization"]["stage"] = combination.stage
        return initialize(config=config, **arguments)

    deepspeed.initialize = unchanged
    found, ignored = train_trial(combination)
    return {"ignored": ignored, **differences(found, known)}


def with_settings(combination: Combination, settings: dict[str, Any], known: Curve) -> dict[str, Any]:
    sections = combination.sections
    sections["zero_optimization"] |= settings
    found, ignored = train_trial(combination, sections)
    return {"ignored": ignored, **differences(found, known)}


def autotp(config: dict, stage: int, known: Curve) -> dict[str, float]:
    """DeepSpeed's own tensor parallelism of a plain Hugging Face model; both ranks read the same batch."""
    import deepspeed

    init_distributed()
    model = reference.hugging_face(config).train()
    adam = {"lr": LR, "betas": list(BETAS), "weight_decay": DECAY, "torch_adam": True}
    ds = {
        "train_micro_batch_size_per_gpu": reference.BATCH,
        "gradient_clipping": CLIP,
        "steps_per_print": 2**31,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {"stage": stage},
        "tensor_parallel": {"autotp_size": 2},
    }
    parameters = list(model.parameters())
    groups: Any = [{"params": [p for p in parameters if p.ndim > 1]},
                   {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
    engine: Any = deepspeed.initialize(model=model, model_parameters=groups, config=ds)[0]
    losses = []
    for step in range(STEPS):
        ids, labels, positions = reference.batch(step, config["vocab_size"])
        logits = engine(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    apart = max(abs(a / b - 1) for a, b in zip(losses, known.losses, strict=True))
    return {"loss": apart}  # they show it: clipping is at work
