"""The DeepSpeed JSON: micro batch, precision, clipping, ZeRO, recomputation, parallelism, optimizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...trainer.optim.registry import optimizer_of
from ...trainer.plan.deepspeed_json import load_ds_config
from ...trainer.plan.settings import without_auto
from .stated import Stated

# of a JSON of the user's own: said in the recipe, or by other keys of Axolotl's
_SAID_ELSEWHERE = (
    "optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
)  # fmt: skip
_PLAIN = re.compile(r"adamw_(torch|torch_fused|torch_xla|hf|apex_fused|anyprecision)|adamw|adam")
_LIGHT = re.compile(r"(paged_)?adamw(_torch)?(_bnb)?_?(8bit|4bit|32bit)?(_ao)?|ao_adamw_(4bit|8bit|fp8)")


def read_deepspeed(stated: Stated, micro: int, folder: Path) -> dict[str, Any]:
    """Args: `folder`: of the Axolotl file, from which paths may be meant."""
    ds: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": stated.number("max_grad_norm", 1.0),
        "optimizer": {"type": _optimizer(stated)},
    }
    precision = _precision(stated)
    if precision is not None:
        ds[precision] = {"enabled": True}
    ds["zero_optimization"] = {"stage": 1 if precision else 0}
    ds |= _own_json(stated, folder)
    ds |= _fsdp(stated)
    for key, path in (
        ("sequence_parallel_degree", ("sequence_parallel_size",)),
        ("context_parallel_size", ("sequence_parallel_size",)),
        ("tensor_parallel_size", ("tensor_parallel", "autotp_size")),
    ):
        if (degree := stated.whole(key, 1)) > 1:
            ds[path[0]] = degree if len(path) == 1 else {path[1]: degree}
    checkpointing = stated.get("gradient_checkpointing", False)
    if checkpointing:
        ds["activation_checkpointing"] = {}
        if checkpointing is not True:
            stated.change("gradient_checkpointing", "activations are computed again, and not kept on the host")
    return ds


def _optimizer(stated: Stated) -> str:
    name = stated.text("optimizer", "adamw_torch_fused")
    if _PLAIN.fullmatch(name):
        return "AdamW"
    if (known := optimizer_of(name)) is not None:
        return known.types[0]
    if _LIGHT.fullmatch(name):
        stated.change("optimizer", f"AdamW, whose moments are fp32 on the device, in place of {name}: the same rule")
    else:
        stated.leave("optimizer", f"AdamW stands in its place, and wants another learning rate than {name}")
    return "AdamW"


def _precision(stated: Stated) -> str | None:
    bf16, fp16 = stated.get("bf16", "auto"), stated.get("fp16", False)
    pure = {key: stated.flag(key) for key in ("bfloat16", "float16", "float32")}
    if bf16 == "auto" and not fp16 and not any(pure.values()):
        stated.change("bf16", "auto: bf16, whatever the device")
        return "bf16"
    if pure["float32"]:
        return None
    if bf16 is True or pure["bfloat16"]:
        return "bf16"
    return "fp16" if fp16 or pure["float16"] else None


def _own_json(stated: Stated, folder: Path) -> dict[str, Any]:
    own = stated.get("deepspeed")
    if own is None:
        return {}
    if isinstance(own, dict):
        return _without_said(stated, own)
    path = next((path for path in (Path(own), folder / own) if path.is_file()), None)
    if path is not None:
        return _without_said(stated, load_ds_config(str(path)))
    stage = re.search(r"zero([0-3])", Path(own).name)
    if stage is None:
        raise stated.error("deepspeed", "no such file")
    zero: dict[str, Any] = {"stage": int(stage[1])}
    if "offload" in own:
        zero["offload_optimizer"] = {"device": "cpu"}
        if (zero["stage"] == 3 and "param" in own) or "all" in own:
            zero["offload_param"] = {"device": "cpu"}
    stated.change(
        "deepspeed", f"no such file; by its name ZeRO {zero['stage']}" + (", offloaded" if "offload" in own else "")
    )
    return {"zero_optimization": zero}


def _without_said(stated: Stated, ds: dict[str, Any]) -> dict[str, Any]:
    precision = {"bf16", "fp16"}
    kept = {key: value for key, value in without_auto(ds).items() if key not in _SAID_ELSEWHERE}
    said = [key for key in _SAID_ELSEWHERE if without_auto(ds).get(key) not in (None, {})]
    if said:
        stated.change("deepspeed", f"{', '.join(said)} of it come from the other keys of this file")
    # "auto" there is what this file says; off is what it says where it says nothing
    return {key: value for key, value in kept.items() if key not in precision or value.get("enabled") is True}


def _fsdp(stated: Stated) -> dict[str, Any]:
    listed, config = stated.get("fsdp", []), stated.get("fsdp_config", {})
    if not listed and not config:
        return {}
    zero: dict[str, Any] = {"stage": 3}
    if config.get("fsdp_offload_params") or config.get("offload_params") or "offload" in str(listed):
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    stated.change("fsdp_config" if config else "fsdp", "ZeRO 3, which partitions the same things")
    return {"zero_optimization": zero}
