"""The verb `generate`. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ...data_prep.errors import UserError
from ..run.quiet import quiet
from .arguments import TEXT_MODEL_HELP, add_chat_arguments, add_model_arguments, add_sampling_arguments, add_verb
from .chosen import chat_template_of, load_chosen

_EPILOG = """\
examples:
  zeropipe generate runs/gpt2-345m --prompt 'Once upon a time'
  zeropipe generate runs/gpt2-345m --prompt A --prompt B --temperature 0.8 --top-p 0.95 --seed 7
  zeropipe generate runs/sft --chat --system 'Be brief.' --prompt 'What is AI?'
"""


def register(verbs: argparse._SubParsersAction) -> None:
    text = "continue prompts: greedy, or sampled with --temperature"
    parser = add_verb(verbs, "generate", run, text, epilog=_EPILOG)
    add_model_arguments(parser, None, "float32 on a CPU, else as trained", TEXT_MODEL_HELP)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line")
    parser.add_argument(
        "--chat", action="store_true", help="each prompt is a user's turn, written by the chat template"
    )
    add_chat_arguments(parser)
    add_sampling_arguments(parser, 64, "%(default)s")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> int:
    quiet()  # before the libraries are imported
    from ..evaluation.chat_format import ChatFormat
    from ..evaluation.generation import Sampling
    from ..evaluation.generation import generate as continue_prompts

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens)
    prompts = [*args.prompt, *_prompts_of(args.prompt_file)]
    for option, value in (("--system", args.system), ("--chat-template", args.chat_template)):
        if value is not None and not args.chat:
            raise UserError(f"{option} is part of a conversation: add --chat")
    template = chat_template_of(args.chat_template)
    model, tokenizer = load_chosen(args)
    chat = ChatFormat(tokenizer, template) if args.chat else None
    results = continue_prompts(model, tokenizer, prompts, sampling, chat, args.system)
    if args.json:
        print(json.dumps([vars(result) for result in results], ensure_ascii=False))
    else:
        between = "\n" if args.chat else ""
        joined = [result.prompt + between + result.text for result in results]
        print(("\n" + "-" * 72 + "\n").join(joined))
    return 0


def _prompts_of(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {file}: cannot be read: {error}") from error
