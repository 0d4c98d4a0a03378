"""A checkpoint as a plain Hugging Face folder: streamed, unpadded, and refused unless its logits are those of training.

The folder appears under its name only when it has been verified; a failure leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...data_prep.durable import publishing
from ...data_prep.errors import UserError
from ...data_prep.making.bars import Told, untold
from ...data_prep.tokenizer import completed
from ..adapters.merged import MergedWeights
from ..adapters.qlora import Onto
from ..checkpoint.files import PROBE
from ..checkpoint.reader import Checkpoint
from ..checkpoint.safetensors_writer import FileTensor, in_groups, write_safetensors
from ..run.directory import run_directory, run_precision, tokenizer_files, tokenizer_folder
from .card import write_card
from .gguf import GgufType, add_gguf
from .load import build_plain, hf_config, load_folder, pick_device, torch_dtype
from .provenance import provenance, write_provenance
from .published import PublishedWeights

SHARD_BYTES = 4 * 10**9
# |difference| of logits over the largest |logit| between the live training engine and the reloaded export, at the
# middle one of the probe's positions, by the coarser of the two precisions. Measured between two attention kernels, and
# against float64, on GPT-2 and Llama of 24 layers, at the worst position: 1.0e-6, 2.7e-3, 2.2e-2. But a trained model
# may have positions at which rounding decides: SmolLM2-135M with an adapter folded in is 2.8e-5 off at the worst in
# float32 and 3.0e-1 in bfloat16, rightly or with a matrix of 210 in disorder; at the middle one it is 1.4e-2 off in
# bfloat16, and 6e-2 or more with that disorder.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Exported:
    """What was written, and how close its logits are to those of training (None: the checkpoint has no probe)."""

    folder: Path
    step: int
    dtype: torch.dtype
    bytes: int
    files: list[str]
    deviation: float | None  # max |difference| / max |logit|
    bound: float | None  # of the deviation; None: not meant to be that of training
    lost: float | None = None  # norm of what quantisation took from the base, over that of the base


def export(
    run_or_checkpoint: str | Path,
    output: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    device: str | None = None,
    base: str | Path | None = None,
    merge_onto: Onto | None = None,
    gguf: GgufType | None = None,
    told: Told = untold,
) -> Exported:
    """Writes safetensors, configs, tokenizer, model card and provenance, and verifies what it wrote.

    Memory: one parameter while writing; the whole model once, in `dtype`, while its logits are verified.

    Args:
        run_or_checkpoint: a run directory (newest whole checkpoint) or one checkpoint.
        output: folder to make; RUN/export by default.
        dtype: "float32", "bfloat16" or "float16"; None: what the run computed with.
        overwrite: replace a folder that is there.
        shard_bytes: largest safetensors file.
        device: that computes the logits; None: the accelerator if there is one, which must hold the whole model.
        base: where the base of the run's adapter is now, if it has moved.
        merge_onto: of a quantised base, that the adapter is folded into; dequantized has the logits of training.
        gguf: also write the model as one GGUF file of this type, verified as transformers reads it.
        told: how many bytes of weights have been written, and read back.

    Raises:
        UserError: nothing to export, `output` is there already, or the reloaded model differs from training.
    """
    verifier = pick_device(device)
    checkpoint = Checkpoint.open(run_or_checkpoint)
    run = run_directory(checkpoint.path)
    if (place := output or (run and run / "export")) is None:
        raise UserError(f"{run_or_checkpoint}: this checkpoint lies in no run directory, so say --output FOLDER")
    target = Path(place)
    precision = run_precision(checkpoint.path, checkpoint.state)
    chosen = torch_dtype(dtype or precision.weights)
    with publishing(target, overwrite) as folder:
        merged = MergedWeights(checkpoint, base, merge_onto)
        weights = PublishedWeights(merged, checkpoint.state["model_config"])
        write_model(checkpoint, weights, folder, chosen, shard_bytes, told)
        if (tokenizer := tokenizer_folder(checkpoint.path)) is not None:
            with completed(tokenizer) as whole:
                copy_tokenizer(whole, folder)
        verify_weights(weights, folder, chosen, told)
        deviation = bound = None
        if (probe := read_probe(checkpoint.path)) is not None:
            bound = None if merge_onto == "original" else max(BOUNDS[torch_dtype(precision.products)], BOUNDS[chosen])
            deviation = verify_logits(partial(load_folder, folder, None), *probe, bound, verifier)
        lost = merged.lost()
        if gguf is not None:
            add_gguf(folder, weights, checkpoint.state["model_config"], gguf)
        facts = provenance(checkpoint, run) | {"export": {"dtype": str(chosen)[6:], "merge_onto": merge_onto}}
        write_card(folder, facts, run)
        write_provenance(folder, facts)
    files = sorted(p.name for p in target.iterdir())
    size = sum((target / name).stat().st_size for name in files)
    return Exported(target, checkpoint.step, chosen, size, files, deviation, bound, lost)


def write_model(
    checkpoint: Checkpoint,
    weights: PublishedWeights,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    told: Told = untold,
) -> None:
    """Weights, index, config.json and generation_config.json; the same bytes for the same weights."""
    tensors = [
        FileTensor(name, weights.shape(name), str(_dtype_of(name, weights, dtype))[6:], partial(weights.read, name))
        for name in weights.names()
    ]
    done, total = 0, 2 * sum(tensor.nbytes for tensor in tensors)  # they will be read back

    def counted(tensor: FileTensor) -> Tensor:
        nonlocal done
        done += tensor.nbytes
        told(done, total)
        return tensor.read()

    files = in_groups([replace(tensor, read=partial(counted, tensor)) for tensor in tensors], shard_bytes)
    where = {}
    for number, group in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        with (folder / name).open("wb") as file:
            write_safetensors(file, group)
            file.flush()
            os.fsync(file.fileno())
        where.update({tensor.key: name for tensor in group})
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    write_configs(checkpoint.state["model_config"], folder, dtype, checkpoint.state.get("stop_ids", []))


def _dtype_of(name: str, weights: PublishedWeights, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name in weights.buffers else dtype


def write_configs(model_config: dict[str, Any], folder: Path, dtype: torch.dtype, stop_ids: Sequence[int] = ()) -> None:
    """config.json and generation_config.json of the model in `dtype`; `stop_ids`: what it has learnt to end with."""
    from transformers import GenerationConfig

    config = hf_config(model_config)
    with torch.device("meta"):
        config.architectures = [type(build_plain(model_config, dtype)).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    if stop_ids:  # a base model's own end of text is not what ends a turn
        stated = generation.eos_token_id
        ends = [*stop_ids, *(stated if isinstance(stated, list) else [] if stated is None else [stated])]
        ends = [*dict.fromkeys(ends)]
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    if generation.pad_token_id is None:  # batches of prompts need one; attention masks it
        end = generation.eos_token_id
        generation.pad_token_id = end[0] if isinstance(end, list) else end
    generation._from_model_config = False  # the file is what counts from here on
    generation.save_pretrained(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files as they are."""
    for file in tokenizer_files(source):
        shutil.copyfile(file, folder / file.name)


def verify_weights(weights: PublishedWeights, folder: Path, dtype: torch.dtype, told: Told = untold) -> None:
    """Reads every tensor back and compares it with what should have been written, bit for bit."""
    found, done = set(), 0
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            names = set(handle.keys())
            found |= names
            for name in filter(names.__contains__, weights.names()):  # in their order, which reads each source once
                written = handle.get_tensor(name)
                done += written.nbytes
                told(total + done, 2 * total)
                if not same_bits(written, weights.read(name).to(_dtype_of(name, weights, dtype))):
                    raise UserError(f"{file.name}: {name} reads back other than it was written; is the disk sound?")
    missing = set(weights.names()) - found
    if missing:
        raise UserError(f"{folder}: parameters are missing after writing: {sorted(missing)}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality under which NaN equals itself and -0 is not 0."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def read_probe(checkpoint: Path) -> tuple[Tensor, Tensor] | None:
    """(ids [1, time], logits [1, time, vocab] fp32) that the live training engine computed when it saved."""
    file = checkpoint / PROBE
    if not file.exists():
        return None
    with safe_open(file, "pt") as handle:
        return handle.get_tensor("ids"), handle.get_tensor("logits")


def verify_logits(
    load: Callable[[], Any], ids: Tensor, expected: Tensor, bound: float | None, device: torch.device
) -> float:
    """Deviation of the reloaded model's logits from `expected`, relative to the largest logit.

    Raises:
        UserError: it is more than `bound`, if there is one; the message names the worst place.
    """
    model = load().eval().to(device)
    with torch.no_grad():
        logits = model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()
    if logits.shape != expected.shape:
        raise UserError(f"the exported model gives logits {list(logits.shape)}, training gave {list(expected.shape)}")
    difference = (logits - expected).abs()
    scale = expected.abs().max().item() or 1.0
    by_position = torch.nan_to_num(difference, nan=torch.inf).amax((0, 2)) / scale  # NaN must fail too
    found = by_position.median().item()
    if bound is not None and not found <= bound:
        place = int(torch.nan_to_num(difference, nan=torch.inf).argmax())
        _, position, token = (int(i) for i in torch.unravel_index(torch.tensor(place), difference.shape))
        raise UserError(
            f"the exported model's logits differ from those of training by {found:.2e} of the largest logit, more than "
            f"{bound:.0e}; worst at position {position}, token {token}: {logits[0, position, token]:.6g} instead of "
            f"{expected[0, position, token]:.6g}. Nothing was exported; please report this"
        )
    return found
