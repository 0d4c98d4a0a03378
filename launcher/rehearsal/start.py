"""`zeropipe launch`, with ranks that come to harm: `python -m zeropipe.launcher.rehearsal.start` and its arguments."""

from __future__ import annotations

import sys

from ...data_prep.command_line import Parser
from ...data_prep.errors import EXIT_USER_ERROR, UserError
from .. import launch_command

RANK = "zeropipe.launcher.rehearsal.rank"


def rehearse_launch(words: list[str]) -> int:
    parser = Parser(prog="zeropipe")
    launch_command.register(parser.add_subparsers(parser_class=Parser))
    args = parser.parse_args(["launch", *words])
    args.module = RANK
    try:
        return args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(rehearse_launch(sys.argv[1:]))
