"""`zeropipe VERB`: each room registers its own verbs; here one is parsed, run, and its outcome made an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ..data_prep import cli as data_prep_verbs
from ..data_prep.command_line import Parser
from ..data_prep.errors import EXIT_USER_ERROR, UserError, did_you_mean, os_problem
from ..trainer.commands import cli as trainer_verbs
from . import (
    completion_command,
    doctor_command,
    families_command,
    import_command,
    init_command,
    launch_command,
    plan_command,
    rehearse_command,
)

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

_DESCRIPTION = "Text in, model out, on any hostfile: one recipe, one DeepSpeed JSON, the same loss on every layout."
_EPILOG = """\
a first run, start to end:
  zeropipe prepare --builtin stdlib --train-tokenizer 2048 --output data/demo
  zeropipe launch demo --deepspeed_config demo --devices 2
  zeropipe eval runs/demo; zeropipe export runs/demo; zeropipe generate runs/demo --prompt 'def main('

exit codes: 0 done; 2 the input, configuration or data is wrong; 3 a rank or host failed; 4 stopped on request, after
saving. `zeropipe VERB --help` tells the rest.
"""


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The whole command line, and the parser of each verb."""
    parser = Parser(
        prog="zeropipe",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"zeropipe {version('zeropipe')}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True, parser_class=Parser)
    for room in (
        data_prep_verbs,
        plan_command,
        doctor_command,
        launch_command,
        rehearse_command,
        trainer_verbs,
        init_command,
        families_command,
        import_command,
    ):
        room.register(verbs)
    completion_command.register(verbs, parser)
    return parser, dict(verbs.choices)


def parse_command(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line; `section.key=value` may stand anywhere after the verb where the verb takes overrides.

    Raises:
        UserError: an unknown verb or option (with the nearest known one), or a missing argument.
    """
    parser, verbs = build_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        raise UserError(f"there is no verb '{argv[0]}'{did_you_mean(argv[0], verbs) or ';'} see `zeropipe --help`")
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "overrides"):  # argparse ends a positional list at the first option: collect the later ones too
        args.overrides = [*args.overrides, *(word for word in rest if is_override(word))]
        rest = [word for word in rest if not is_override(word)]
    if rest:
        known = [option for action in verbs[args.verb]._actions for option in action.option_strings]
        hint = did_you_mean(rest[0].split("=")[0], known)
        raise UserError(
            f"`zeropipe {args.verb}` does not know '{rest[0]}'{hint or ';'} see `zeropipe {args.verb} --help`"
        )
    return args


def is_override(word: str) -> bool:
    return not word.startswith("-") and "=" in word


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
        problem, advice = os_problem(error, where="writing")
        if not advice:
            raise
        return _fail(f"{problem}; {advice}, or choose another place")


def _run(argv: Sequence[str]) -> int:
    try:
        args = parse_command(argv)
        return args.run(args) or 0
    finally:
        sys.stdout.flush()  # here, where a reader that has gone is still an exception and not noise at exit


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR
