"""The recipe: model, objective, adapter, batch, duration, optimizer, schedule, cadence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .stated import Stated

_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "cosine_with_min_lr": "cosine",
}


def read_model(stated: Stated) -> dict[str, Any]:
    base = stated.text("base_model")
    if base is None:
        raise stated.error("base_model", "missing")
    if not Path(base).exists():
        stated.change("base_model", f"no folder {base} here: get the model, and state its folder in model.init")
    config = {**stated.get("model_config", {}), **stated.get("overrides_of_model_config", {})}
    if "rope_scaling" in stated:
        config["rope_scaling"] = stated.get("rope_scaling")
    return {"init": base, **({"config": config} if config else {})}


def read_objective(stated: Stated) -> Any:
    """None: told by the data."""
    method = stated.get("rl")
    if method is None or method is False:
        return None
    if method not in ("dpo", "ipo"):
        raise stated.error("rl", "has no counterpart here; there are dpo and ipo")
    objective = {"type": "dpo", "beta": stated.number("rl_beta", stated.number("dpo_beta", 0.1))}
    if method == "ipo":
        objective["loss"] = "ipo"
    if smoothing := stated.number("dpo_label_smoothing", 0.0):
        objective["label_smoothing"] = smoothing
    return objective


def learnt_from(kind: str, stated: Stated) -> Any:
    """The objective of data without preferences, `sft` or `text`."""
    objective: dict[str, Any] = {"type": {"sft": "sft", "text": "causal_lm"}[kind]}
    if smoothing := stated.number("label_smoothing_factor"):
        objective["label_smoothing"] = smoothing
    key = next((key for key in ("neftune_noise_alpha", "noisy_embedding_alpha") if key in stated), "")  # new, old name
    if kind == "sft" and (alpha := stated.number(key)):
        objective["neftune"] = alpha
        stated.change(key, "scaled by the length of each record, not of the padded batch")
    return objective if len(objective) > 1 else objective["type"]


def read_adapter(stated: Stated) -> Any:
    kind = stated.text("adapter")
    quantised = stated.flag("load_in_4bit")
    if stated.flag("load_in_8bit"):
        stated.leave("load_in_8bit", "weights stay in the precision of the run; `type: qlora` has them in 4 bits")
    if not kind:
        return "none"
    if kind not in ("lora", "qlora"):
        raise stated.error("adapter", "has no counterpart here; there are lora and qlora")
    adapter: dict[str, Any] = {"type": "qlora" if quantised else kind}
    if adapter["type"] != kind:
        stated.change("adapter", "with load_in_4bit it is qlora")
    options = (
        ("lora_r", "r", stated.whole),
        ("lora_alpha", "alpha", stated.number),
        ("lora_dropout", "dropout", stated.number),
    )
    for key, name, read in options:
        if (value := read(key)) is not None:
            adapter[name] = value
    adapter["targets"] = _targets(stated)
    if saved := stated.names("lora_modules_to_save"):
        adapter["modules_to_save"] = saved
    for key, name in (("peft_use_rslora", "rslora"), ("peft_use_dora", "dora")):
        if stated.flag(key):
            adapter[name] = True
    if (ratio := stated.number("loraplus_lr_ratio")) is not None:
        adapter["lr_ratio"] = ratio
    init = stated.get("peft_init_lora_weights", True)
    if init == "pissa":
        adapter["init"] = "pissa"
    elif init is not True:
        stated.leave("peft_init_lora_weights", "there are default (A uniform, B zero) and pissa")
    return adapter


def _targets(stated: Stated) -> Any:
    names, linear = stated.names("lora_target_modules"), stated.flag("lora_target_linear")
    if linear or names == ["all-linear"]:
        if linear and names:
            stated.change("lora_target_modules", "lora_target_linear is set too: all linears of the blocks")
        return "all-linear"
    if not names:
        stated.change("adapter", "no target is stated: all linears of the blocks")
        return "all-linear"
    return names


def read_batch(stated: Stated, devices: int) -> tuple[int, int]:
    """Micro batch of a device, and sequences of a step over all of them."""
    micro = stated.whole("micro_batch_size")
    steps, per_device = stated.whole("gradient_accumulation_steps"), stated.whole("batch_size")
    if micro is None:
        micro = per_device // steps if per_device and steps else 1
    if per_device is not None and steps is None:
        if per_device % micro:
            raise stated.error("batch_size", f"must be a multiple of micro_batch_size {micro}")
        steps = per_device // micro
    if micro < 1 or (steps or 1) < 1:
        raise stated.error("micro_batch_size" if micro < 1 else "gradient_accumulation_steps", "must be 1 or more")
    keys = ("sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size")
    shared = 1
    for key in keys:
        shared *= stated.whole(key, 1)
    if devices % shared:
        raise stated.error(next(key for key in keys if key in stated), f"does not divide the {devices} devices")
    return micro, micro * (steps or 1) * (devices // shared)


def read_duration(stated: Stated) -> dict[str, Any]:
    steps, epochs = stated.whole("max_steps"), stated.number("num_epochs")
    if steps is not None and steps > 0:
        if epochs is not None:
            stated.change(
                "num_epochs", f"left to max_steps; Axolotl ends at whichever comes first, this after {steps} steps"
            )
        return {"steps": steps}
    return {"epochs": float(epochs or 1)}


def read_optimizer(stated: Stated, adapter: Any) -> dict[str, Any]:
    """With Axolotl's defaults spelled out, which are others than ours."""
    rate = stated.number("learning_rate")
    if rate is None:
        raise stated.error("learning_rate", "missing")
    return {
        "lr": float(rate),
        "betas": [stated.number("adam_beta1", 0.9), stated.number("adam_beta2", 0.999)],
        "eps": float(stated.number("adam_epsilon", 1e-8)),
        "weight_decay": float(stated.number("weight_decay", 0.0)),
        **_embedding_rate(stated, float(rate), adapter),
    }


def _embedding_rate(stated: Stated, rate: float, adapter: Any) -> dict[str, float]:
    if adapter != "none" and "modules_to_save" not in adapter:
        for key in ("embedding_lr", "embedding_lr_scale"):
            stated.leave(key, "the adapter leaves embedding and head as they are")
        return {}
    scale, own = stated.number("embedding_lr_scale"), stated.number("embedding_lr")
    if scale:  # it comes first there
        own = rate * scale
    return {"embedding_lr": float(own)} if own else {}


def read_schedule(stated: Stated, lr: float) -> dict[str, Any]:
    name = stated.text("lr_scheduler", "cosine")
    schedule: dict[str, Any] = {"type": _SCHEDULES.get(name, "cosine"), "warmup": _warmup(stated)}
    if name not in _SCHEDULES:
        stated.leave("lr_scheduler", f"cosine stands in its place; there are {', '.join(_SCHEDULES)}")
    if name == "constant":
        schedule["warmup"] = 0
    options = stated.section("lr_scheduler_kwargs")
    floor = stated.number("cosine_min_lr_ratio", options.number("min_lr_rate", 0.0)) * lr
    floor = options.number("min_lr", floor)
    if floor:
        schedule["min_lr"] = float(floor)
    if schedule["type"] == "wsd" and (decay := options.whole("num_decay_steps")) is not None:
        schedule["decay"] = decay
    options.leave_rest({}, "the schedule has warmup, min_lr and, for wsd, decay")
    return schedule


def _warmup(stated: Stated) -> int | float:
    steps, ratio = stated.number("warmup_steps"), stated.number("warmup_ratio")
    if steps is not None:
        return int(steps) if steps >= 1 or steps == 0 else float(steps)  # transformers takes a fraction there, too
    if ratio is None:
        return 0.03  # Axolotl's own default, there with at most 100 steps
    if ratio >= 1:
        raise stated.error("warmup_ratio", "must be below 1")
    return float(ratio) if ratio else 0


def read_cadence(stated: Stated, evaluates: bool) -> dict[str, dict[str, Any]]:
    """`log`, `eval` and `save`."""
    cadence: dict[str, dict[str, Any]] = {"log": {}, "eval": {}, "save": {}}
    if (every := stated.whole("logging_steps")) is not None:
        cadence["log"]["every"] = max(1, every)
    if "use_tensorboard" in stated and not stated.flag("use_tensorboard"):
        cadence["log"]["sinks"] = []
    for verb, plural in (("eval", "evals"), ("save", "saves")):
        every = _every(stated, verb, plural)
        if every is not None:
            cadence[verb]["every"] = every
    if not evaluates:
        cadence["eval"] = {"every": 0}
    if (keep := stated.whole("save_total_limit")) is not None:
        cadence["save"]["keep"] = keep
    return {name: section for name, section in cadence.items() if section}


def _every(stated: Stated, verb: str, plural: str) -> int | None:
    strategy = stated.get(f"{verb}_strategy", stated.get("evaluation_strategy") if verb == "eval" else None)
    steps, total = stated.number(f"{verb}_steps"), stated.whole("max_steps")
    if strategy in ("no", False):
        return 0
    unknown = f"how many steps an epoch has is known when the data is prepared (`zeropipe plan`): set {verb}.every"
    stated.leave(f"{plural}_per_epoch", unknown)
    if strategy in ("epoch", "best"):
        stated.leave(f"{verb}_strategy", unknown)
    if steps is None:
        return None
    if steps >= 1:
        return int(steps)
    if total is None or total < 1:
        stated.leave(f"{verb}_steps", f"a share of all steps: set {verb}.every to that many")
        return None
    return max(1, round(steps * total))
