"""The adapter of a checkpoint as a folder that plain peft loads, refused unless its logits are those of training."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...data_prep.durable import publishing
from ...data_prep.errors import UserError
from ...data_prep.tokenizer import completed
from ..adapters.bases import Base, locate
from ..adapters.lora import Lora
from ..adapters.merged import base_values
from ..adapters.registry import adapter_of
from ..checkpoint.reader import Checkpoint
from ..modeling.build import model_specs
from ..modeling.values import all_of
from ..run.directory import run_directory, run_precision, tokenizer_folder
from .card import write_card
from .huggingface import BOUNDS, Exported, copy_tokenizer, read_probe, verify_logits
from .load import build_plain, pick_device, torch_dtype
from .provenance import provenance

_PREFIX = "base_model.model."
_HELD = {"lora_A", "lora_B", "lora_magnitude_vector"}  # of a linear, in peft's files


def export_adapter(
    run_or_checkpoint: str | Path,
    output: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    device: str | None = None,
    base: str | Path | None = None,
) -> Exported:
    """Writes adapter_config.json, adapter_model.safetensors and the tokenizer, and verifies them on the base.

    A PiSSA adapter is written as the plain LoRA of twice the rank that does the same to the base as it is.

    Args:
        base: where the base is now, if it has moved.

    Raises:
        UserError: as `export`; the run has no adapter that peft knows, or its base is not there.
    """
    verifier = pick_device(device)
    checkpoint = Checkpoint.open(run_or_checkpoint)
    adapter = adapter_of(checkpoint.state.get("adapter", "none"))
    if not isinstance(adapter, Lora):
        raise UserError(f"{run_or_checkpoint}: was trained without LoRA, so there is no adapter to write for peft")
    place = locate(Base(**checkpoint.state["base"]), base, f"{checkpoint.path}: ")
    precision = run_precision(checkpoint.path, checkpoint.state)
    chosen, target = torch_dtype(dtype or precision.weights), Path(output)
    with publishing(target, overwrite) as folder:
        peft_config(adapter, checkpoint, place).save_pretrained(str(folder))
        tensors = {key: tensor.to(chosen).contiguous() for key, tensor in _tensors(adapter, checkpoint).items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if (tokenizer := tokenizer_folder(checkpoint.path)) is not None:
            with completed(tokenizer) as whole:
                copy_tokenizer(whole, folder)
        probe, deviation, bound = read_probe(checkpoint.path), None, None
        if probe is not None:
            bound = max(BOUNDS[torch_dtype(precision.products)], BOUNDS[chosen])
            load = partial(load_with_peft, checkpoint, folder, torch_dtype(precision.weights), base)
            deviation = verify_logits(load, *probe, bound, verifier)
        run = run_directory(checkpoint.path)
        write_card(folder, provenance(checkpoint, run), run, place)
    files = sorted(path.name for path in target.iterdir())
    size = sum((target / name).stat().st_size for name in files)
    return Exported(target, checkpoint.step, chosen, size, files, deviation, bound)


def load_with_peft(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, base: str | Path | None = None) -> Any:
    """The base of a checkpoint's LoRA as training saw it, in a plain model, with a folder's adapter on it by peft."""
    from peft import PeftModel

    adapter: Lora = adapter_of(checkpoint.state["adapter"])  # type: ignore[assignment]

    model = build_plain(checkpoint.state["model_config"], dtype)
    specs, values = model_specs(checkpoint.state["model_config"]), base_values(checkpoint, base)
    with torch.no_grad():
        held = model.state_dict(keep_vars=True)
        for name, spec in specs.items():
            held[name].copy_(adapter.seen(spec, all_of(values, spec).float()))
    return PeftModel.from_pretrained(model, str(folder))


def peft_config(adapter: Lora, checkpoint: Checkpoint, base: str) -> Any:
    """peft's configuration of an adapter."""
    from peft import LoraConfig

    options, specs = adapter.options, model_specs(checkpoint.state["model_config"])
    saved = [name.rpartition(".")[0] for name in _saved(checkpoint)]
    modules = [name.removesuffix(".lora_A.weight") for name in checkpoint.names() if name.endswith(".lora_A.weight")]
    leaves = sorted({module.rpartition(".")[2] for module in modules})
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=None if base == "random" else base,
        r=options.r * (2 if options.pissa else 1),
        lora_alpha=options.alpha * _alpha_factor(adapter),  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        target_modules=list(options.named_targets) or leaves,
        fan_in_fan_out=specs[f"{modules[0]}.weight"].conv,
        use_rslora=options.rslora,
        use_dora=options.dora,
        modules_to_save=sorted(set(saved)) or None,
        inference_mode=True,
    )


def _alpha_factor(adapter: Lora) -> float:
    """What keeps the scale when PiSSA's rank is doubled."""
    if not adapter.options.pissa:
        return 1
    return math.sqrt(2) if adapter.options.rslora else 2


def _saved(checkpoint: Checkpoint) -> dict[str, str]:
    """The model's own parameters that were trained, by the names that peft needs: of a tied one, each of its names,
    because peft ties what it saves for few families.
    """
    own = [name for name in checkpoint.names() if ".lora_" not in name]
    with torch.device("meta"):
        tied: dict[str, str] = build_plain(checkpoint.state["model_config"], "float32").all_tied_weights_keys or {}  # type: ignore
    return {name: name for name in own} | {name: source for name, source in tied.items() if source in own}


def _tensors(adapter: Lora, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """By peft's keys."""
    found = {_PREFIX + name: checkpoint.read(source) for name, source in _saved(checkpoint).items()}
    for name in checkpoint.names():
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf in _HELD:
            tensor = checkpoint.read(name)
            if adapter.options.pissa and leaf in ("lora_A", "lora_B"):
                initial = checkpoint.read(f"{module}.{leaf}0.weight")
                tensor = torch.cat([tensor, initial]) if leaf == "lora_A" else torch.cat([tensor, -initial], 1)
            found[_PREFIX + (name if leaf != "lora_magnitude_vector" else name.removesuffix(".weight"))] = tensor
    return found
