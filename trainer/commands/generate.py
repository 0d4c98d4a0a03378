"""The verb `generate`. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ...data_prep.errors import UserError
from ..run.quiet import quiet
from .arguments import add_model_arguments, add_verb
from .chosen import chosen_checkpoint

_EPILOG = """\
examples:
  zeropipe generate runs/gpt2-345m --prompt 'Once upon a time'
  zeropipe generate runs/gpt2-345m --prompt A --prompt B --temperature 0.8 --top-p 0.95 --seed 7
"""


def register(verbs: argparse._SubParsersAction) -> None:
    text = "continue prompts: greedy, or sampled with --temperature"
    parser = add_verb(verbs, "generate", run, text, epilog=_EPILOG)
    add_model_arguments(parser, None, "float32 on a CPU, else as trained")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the K likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that make up P; 1: all")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="default: the run's or the folder's own")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> int:
    quiet()  # before the libraries are imported
    from ..evaluation.generation import Sampling
    from ..evaluation.generation import generate as continue_prompts
    from ..export.load import load_model, load_tokenizer, pick_device

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens)
    prompts = [*args.prompt, *_prompts_of(args.prompt_file)]
    device = pick_device(args.device)
    dtype = args.dtype or ("float32" if device.type == "cpu" else None)
    model, tokenizer = load_model(chosen_checkpoint(args.model, args.checkpoint), dtype, args.base)
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
