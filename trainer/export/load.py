"""A plain Hugging Face model and its tokenizer, from a run, one of its checkpoints, or a Hugging Face folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...data_prep.errors import UserError
from ...data_prep.tokenizer import completed
from ..adapters.merged import MergedWeights
from ..families.weight_files import refuse_own_code
from ..run.directory import is_hf_folder, run_precision, tokenizer_folder

if TYPE_CHECKING:
    from ..checkpoint.reader import Checkpoint


def load_model(
    path: str | Path, dtype: str | torch.dtype | None = None, base: str | Path | None = None
) -> tuple[Any, Any]:
    """The model in evaluation mode on the CPU, and its tokenizer (None where there is none).

    Args:
        path: a run directory (its newest whole checkpoint), a checkpoint, or a Hugging Face folder with safetensors.
        dtype: of the parameters; None: what the run computed with, or what the folder holds.
        base: where the base of the run's adapter is now, if it has moved.

    Raises:
        UserError: nothing there to load, pickled weights, missing parameters, a damaged file.
    """
    path = Path(path)
    if is_hf_folder(path):
        if base is not None:
            raise UserError(f"--base {base}: {path} holds a whole model, which has no base")
        model = load_folder(path, dtype)
    else:
        from ..checkpoint.reader import Checkpoint

        checkpoint = Checkpoint.open(path)
        model = load_checkpoint(checkpoint, dtype or run_precision(checkpoint.path, checkpoint.state).weights, base)
    return model.eval(), load_tokenizer(path)


def load_folder(folder: Path, dtype: str | torch.dtype | None) -> Any:
    """A Hugging Face folder through `AutoModelForCausalLM`; only safetensors, only local files, only known code."""
    from transformers import AutoModelForCausalLM

    if not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"only {', '.join(pickles)}: pickles can run code when opened, and are refused" if pickles else "none"
        raise UserError(f"{folder}: no *.safetensors there; found {found}. Save the model as safetensors")
    try:
        refuse_own_code(json.loads((folder / "config.json").read_bytes()), folder / "config.json")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,  # left out, it may ask
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: transformers cannot load it as a causal LM: {error}") from error
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted([*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])])
        raise UserError(f"{folder}: parameters of the model are missing there, or have other shapes: {wrong}")
    return model


def load_checkpoint(checkpoint: Checkpoint, dtype: str | torch.dtype, base: str | Path | None = None) -> Any:
    """A checkpoint's master weights, cast to `dtype`, in the plain Hugging Face model; one parameter at a time."""
    model = build_plain(checkpoint.state["model_config"], dtype)
    expected, weights = dict(model.named_parameters()), MergedWeights(checkpoint, base)
    expected |= {name: buffer for name, buffer in model.named_buffers() if name in weights.buffers}
    missing = sorted(set(expected) - set(weights.names()))
    if missing:
        raise UserError(f"{checkpoint.path}: the checkpoint lacks parameters of its own model: {missing}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights.read(name))
    return model


def build_plain(config: dict[str, Any], dtype: str | torch.dtype) -> nn.Module:
    """The Hugging Face model of a configuration, parameters allocated and not initialised, tied where it ties."""
    from transformers import AutoModelForCausalLM, initialization

    with initialization.no_init_weights():
        model = AutoModelForCausalLM.from_config(hf_config(config), dtype=torch_dtype(dtype), trust_remote_code=False)
    model.tie_weights()
    return model


def hf_config(config: dict[str, Any]) -> Any:
    """transformers' configuration object of a checkpoint's `model_config`."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**config)


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype by name ("float32", "bfloat16", "float16")."""
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a run, checkpoint or folder; None where there is none."""
    from transformers import AutoTokenizer

    folder = tokenizer_folder(path)
    if folder is None:
        return None
    try:
        with completed(folder) as whole:
            return AutoTokenizer.from_pretrained(whole, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: transformers cannot load the tokenizer: {error}") from error


def pick_device(wanted: str | None) -> torch.device:
    """The device of a single-process verb: the one asked for, else the accelerator there is, else the CPU."""
    if wanted:
        try:
            return torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {wanted}: not usable here: {error}") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    return accelerator
