"""`zeropipe launch`, with ranks that come to harm: `python -m zeropipe.launcher.rehearsal.start` and its arguments."""

from __future__ import annotations

import sys

from ...data_prep.errors import EXIT_USER_ERROR, UserError
from ..cli import parse_command

RANK = "zeropipe.launcher.rehearsal.rank"


def start(words: list[str]) -> int:
    args = parse_command(["launch", *words])
    args.module = RANK
    try:
        return args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
