"""What the trainer's verbs do. Heavy imports wait until a verb runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...data_prep.errors import UserError

if TYPE_CHECKING:
    from ..evaluation.evaluate import HeldOutData


def train(args: argparse.Namespace) -> int:
    from .train import main

    return main(["--run", args.recipe, "--deepspeed_config", args.deepspeed_config, *args.overrides])


def evaluate(args: argparse.Namespace) -> int:
    _quiet()
    from ..evaluation.evaluate import as_json, evaluate_model
    from ..evaluation.evaluate import report as text_of
    from ..export.load import load_model, pick_device

    batches = _batches(args.batches)
    source = _checkpoint(args.model, args.checkpoint)
    device = pick_device(args.device)
    data = _eval_data(args, source)
    model, _ = load_model(source, args.dtype)
    evaluation = evaluate_model(model.to(device), data, batches, _progress)
    print(json.dumps(as_json(evaluation)) if args.json else text_of(evaluation))
    return 0


def _batches(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batches {text}: expected a number of 1 or more, or all")
    return int(text)


def _eval_data(args: argparse.Namespace, source: Path) -> HeldOutData:
    from ..checkpoint.reader import Checkpoint
    from ..evaluation.evaluate import run_data, store_data
    from ..run.directory import is_hf_folder, load_run_recipe, run_directory, tokenizer_folder

    tokenizer = tokenizer_folder(source)
    run = run_directory(source)
    if is_hf_folder(source):
        if args.store is not None:
            return store_data(args.store, args.seq_len or _context(source), tokenizer)
        if run is None:
            raise UserError(f"{source}: a Hugging Face folder has no data of its own; name a token store with --store")
        recipe = load_run_recipe(run)  # of the run that it was exported from
        return run_data(recipe, args.split, tokenizer, recipe.batch.global_batch or 8)
    if args.store is not None:
        recipe = load_run_recipe(run) if run else None
        seq_len = args.seq_len or Checkpoint.open(source, verify=False).state["seq_len"]
        return store_data(args.store, seq_len, tokenizer, bool(recipe and recipe.data.document_mask))
    if run is None:
        raise UserError(f"{source}: this checkpoint lies in no run directory; name a token store with --store")
    state = Checkpoint.open(source, verify=False).state
    return run_data(load_run_recipe(run), args.split, tokenizer, state["global_batch"])


def _context(folder: Path) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return min(1024, config.max_position_embeddings)


def _checkpoint(path: str, step: int | None) -> Path:
    """The checkpoint of a run at `step`; the path as it is where no step is asked for."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such run, checkpoint or Hugging Face folder")
    if step is None:
        return Path(path)
    from ..checkpoint.folder import step_folders

    found = {folder.name: folder for folder in step_folders(path)}
    name = f"step-{step:08d}"
    if name not in found:
        steps = ", ".join(str(int(known.partition("-")[2])) for known in sorted(found))
        raise UserError(f"{path}: no checkpoint at step {step}; there are {steps or 'none'}")
    return found[name]


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} sequences", end="\n" if done >= total else "", file=sys.stderr, flush=True)


def generate(args: argparse.Namespace) -> int:
    _quiet()
    from ..evaluation.generation import Sampling
    from ..evaluation.generation import generate as continue_prompts
    from ..export.load import load_model, load_tokenizer, pick_device

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens)
    prompts = [*args.prompt, *_prompts_of(args.prompt_file)]
    device = pick_device(args.device)
    dtype = args.dtype or ("float32" if device.type == "cpu" else None)
    model, tokenizer = load_model(_checkpoint(args.model, args.checkpoint), dtype)
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
    results = continue_prompts(model.to(device), tokenizer, prompts, sampling)
    if args.json:
        print(json.dumps([vars(result) for result in results], ensure_ascii=False))
    else:
        print(("\n" + "-" * 72 + "\n").join(result.prompt + result.text for result in results))
    return 0


def _prompts_of(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {file}: cannot be read: {error}") from error


def export(args: argparse.Namespace) -> int:
    _quiet()
    from ..export.huggingface import export as export_folder

    source = _checkpoint(args.run_directory, args.checkpoint)
    done = export_folder(source, args.output, args.dtype, args.overwrite, int(args.max_shard_gb * 10**9))
    dtype = str(done.dtype).removeprefix("torch.")
    print(f"exported step {done.step} as {dtype}, {done.bytes / 1e6:,.1f} MB: {done.folder}")
    if done.deviation is None:
        print("the checkpoint holds no probe, so the logits were not compared; every tensor was read back and is equal")
    else:
        print(f"verified: logits within {done.deviation:.1e} of training's, allowed {done.bound:.0e} of the largest")
    if "tokenizer.json" not in done.files:
        print("no tokenizer was found for this run, so the folder holds none")
    return 0


def ckpt_ls(args: argparse.Namespace) -> int:
    from ..checkpoint.folder import ls

    for item in ls(args.path):
        print(f"{item.step:>10}  {item.nbytes / 1e6:>12,.1f} MB  {item.problem or 'whole'}  {item.path}")
    return 0


def ckpt_verify(args: argparse.Namespace) -> int:
    from ..checkpoint.folder import verify_checkpoints

    found = verify_checkpoints(args.path)
    if not found:
        raise UserError(f"{args.path}: no checkpoint here")
    bad = {path: problems for path, problems in found.items() if problems}
    for path in found:
        print(f"{path}: {'DAMAGED' if path in bad else 'whole'}")
    if bad:
        raise UserError("; ".join(problem for problems in bad.values() for problem in problems))
    return 0


def ckpt_prune(args: argparse.Namespace) -> int:
    from ..checkpoint.folder import prune

    removed = prune(args.path, args.keep)
    print("\n".join(f"removed {path}" for path in removed) or "nothing to remove")
    return 0


def ckpt_audit(args: argparse.Namespace) -> int:
    from ..metrics.audit import audit
    from ..metrics.audit import report as text_of

    print(text_of(audit(args.path)))
    return 0


def report(args: argparse.Namespace) -> int:
    from ..metrics.report import report as text_of

    print(text_of(args.run_directory))
    return 0


def _quiet() -> None:
    from ..run.quiet import quiet

    quiet()
