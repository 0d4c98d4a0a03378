"""`zeropipe VERB`: each room registers its own verbs; here one is parsed, run, and its outcome made an exit code."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import NoReturn

from ..data_prep import cli as data_prep_verbs
from ..data_prep.errors import EXIT_USER_ERROR, UserError
from ..trainer.commands import cli as trainer_verbs
from . import init_command, launch_command, plan_command

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}

DESCRIPTION = "Text in, model out, on any hostfile: one recipe, one DeepSpeed JSON, the same loss on every layout."
EPILOG = """\
a first run, start to end:
  zeropipe prepare --builtin stdlib --train-tokenizer 2048 --output data/demo
  zeropipe launch demo --deepspeed_config demo --devices 2
  zeropipe eval runs/demo; zeropipe export runs/demo; zeropipe generate runs/demo --prompt 'def main('

exit codes: 0 done; 2 the input, configuration or data is wrong; 3 a rank or host failed; 4 stopped on request, after
saving. `zeropipe VERB --help` tells the rest.
"""


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is a `UserError` like any other, and long options are never abbreviated."""

    def __init__(self, *args, **kwargs) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n  usage: see `{self.prog} --help`")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The whole command line, and the parser of each verb."""
    parser = Parser(
        prog="zeropipe",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"zeropipe {version('zeropipe')}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True, parser_class=Parser)
    for room in (data_prep_verbs, plan_command, launch_command, trainer_verbs, init_command):
        room.register(verbs)
    return parser, dict(verbs.choices)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line; `section.key=value` may stand anywhere after the verb where the verb takes overrides.

    Raises:
        UserError: an unknown verb or option (with the nearest known one), or a missing argument.
    """
    parser, verbs = build_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        raise UserError(f"there is no verb '{argv[0]}'{did_you_mean(argv[0], verbs)}; see `zeropipe --help`")
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "overrides"):  # argparse ends a positional list at the first option: collect the later ones too
        args.overrides = [*args.overrides, *(word for word in rest if is_override(word))]
        rest = [word for word in rest if not is_override(word)]
    if rest:
        known = [option for action in verbs[args.verb]._actions for option in action.option_strings]
        hint = did_you_mean(rest[0].split("=")[0], known)
        raise UserError(f"`zeropipe {args.verb}` does not know '{rest[0]}'{hint}; see `zeropipe {args.verb} --help`")
    return args


def is_override(word: str) -> bool:
    return not word.startswith("-") and "=" in word


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code; what the user did wrong is one `error: …` on stderr, no traceback."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader has gone, as in `zeropipe inspect … | head`: nothing may be written to it at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return _fail(f"{error.filename or 'writing'}: {error.strerror}; free some space or choose another place")


def _run(argv: Sequence[str]) -> int:
    try:
        args = parse(argv)
        return args.run(args) or 0
    finally:
        sys.stdout.flush()  # here, where a reader that has gone is still an exception and not noise at exit


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR
