"""The verb `chat`. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from ...data_prep.errors import UserError, did_you_mean
from ..run.quiet import quiet
from .arguments import TEXT_MODEL_HELP, add_chat_arguments, add_model_arguments, add_sampling_arguments, add_verb
from .chosen import chat_template_of, load_chosen

if TYPE_CHECKING:
    from ..evaluation.chat import Answer, Conversation

_DEFAULT_NEW_TOKENS = 256
_COMMANDS = ("/reset", "/system", "/exit")
_DESCRIPTION = """\
Talk with a model. At a terminal: /reset begins anew, /system TEXT sets another system prompt (none without TEXT), /exit
or Ctrl-D ends, Ctrl-C stops an answer. Otherwise every line of standard input is one turn, answers go to standard
output, and a turn that cannot be answered ends it. A line that begins with a space is never a command.

When the context is full, the oldest exchanges are dropped and a note says so; the system prompt stays.
"""
_EPILOG = """\
examples:
  zeropipe chat runs/sft
  zeropipe chat adapter --base smollm2 --system 'Answer in one word.' --temperature 0.7
  printf 'Hello\\nAnd in French?\\n' | zeropipe chat smollm2 --json
"""


def register(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(verbs, "chat", run, "talk with a model, answers streamed", _DESCRIPTION, _EPILOG)
    add_model_arguments(parser, None, "float32 on a CPU, else as trained", TEXT_MODEL_HELP)
    add_chat_arguments(parser)
    add_sampling_arguments(parser, None, f"{_DEFAULT_NEW_TOKENS}, or half of the context if that is less")
    parser.add_argument("--json", action="store_true", help="print each answer as a JSON object of one line")


def run(args: argparse.Namespace) -> int:
    quiet()  # before the libraries are imported
    from ..evaluation.chat import Conversation
    from ..evaluation.chat_format import ChatFormat
    from ..evaluation.generation import Sampling, context_of

    limit = _DEFAULT_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed, limit)
    template = chat_template_of(args.chat_template)
    model, tokenizer = load_chosen(args)
    context = context_of(model)
    if args.max_new_tokens is None and context is not None:
        sampling = replace(sampling, max_new_tokens=min(limit, max(1, context // 2)))
    talk(Conversation(model, ChatFormat(tokenizer, template), sampling, args.system), args.json)
    return 0


def talk(conversation: Conversation, as_json: bool) -> None:
    """Reads turns until they end, and answers them."""
    interactive = sys.stdin.isatty()
    if interactive:
        _note("/reset, /system TEXT, /exit; Ctrl-C stops an answer, Ctrl-D ends")
    for number, line in enumerate(_typed() if interactive else _lines(), 1):
        text = line.strip()
        try:
            if re.match(r"/[a-z]+(\s|$)", line):
                if _obey(conversation, text):
                    return
            elif text:
                _answer(conversation, text, as_json, interactive)
        except UserError as error:
            if not interactive:
                raise UserError(f"line {number} of standard input: {error}") from None
            _note(str(error))
        except KeyboardInterrupt:
            if not interactive:
                raise
            _note("stopped")


def _answer(conversation: Conversation, text: str, as_json: bool, interactive: bool) -> None:
    answer = conversation.say(text, _silent if as_json else _print_piece)
    if answer.stopped and not interactive:
        raise KeyboardInterrupt  # no terminal, so it is meant for the whole command
    if as_json:
        print(json.dumps(asdict(answer), ensure_ascii=False), flush=True)
    else:
        print(flush=True)
    for note in _remarks(answer):
        _note(note)


def _remarks(answer: Answer) -> Iterator[str]:
    if answer.dropped:
        yield f"the context is full: the model no longer sees the oldest {answer.dropped} exchange(s)"
    if answer.stopped:
        yield "stopped"
    elif not answer.ended:
        yield f"cut off after {answer.tokens} tokens (--max-new-tokens)"


def _obey(conversation: Conversation, line: str) -> bool:
    """Does what a command says; True if it ends the conversation."""
    command, _, rest = line.partition(" ")
    if command not in _COMMANDS:
        hint = did_you_mean(command, _COMMANDS) or f"; there are {', '.join(_COMMANDS)}"
        raise UserError(f"no command {command}{hint}. To say it, put a space before it")
    if command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.system = rest.strip() or None
    return command == "/exit"


def _typed() -> Iterator[str]:
    import readline  # noqa: F401  (gives `input` editing and a history)

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _note("Ctrl-D or /exit ends")


def _lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 text ({error.reason})") from None


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _silent(text: str) -> None:
    pass


def _note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
