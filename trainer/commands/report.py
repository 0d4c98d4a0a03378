"""The verbs `report` and `watch`: the curves of runs. Heavy imports wait until they run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...data_prep.errors import UserError
from ...data_prep.sizes import format_bytes
from .arguments import add_verb

_PORT = 6070
_WATCH = """Serves the page of `report --html` and keeps it up to date, from the files of the runs alone: while they
train, after a crash, on any host that sees them. From elsewhere: ssh -L 6070:127.0.0.1:6070 HOST."""


def register(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(verbs, "report", run, "a run's loss curve, throughput, evaluations and resumes, or a page")
    parser.add_argument("run_directories", nargs="+", metavar="RUN")
    parser.add_argument("--html", type=Path, metavar="FILE", help="all runs as one page, which opens without a network")
    parser = add_verb(
        verbs, "watch", watch, "the page of curves of a run, or of a folder of runs, as they train", _WATCH
    )
    parser.add_argument("place", type=Path, metavar="RUN|FOLDER")
    parser.add_argument("--tui", action="store_true", help="in the terminal")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; beyond the loopback a token is asked for")
    parser.add_argument("--port", type=int, default=_PORT, help=f"{_PORT} unless told otherwise; 0: one that is free")


def run(args: argparse.Namespace) -> int:
    if args.html is not None:
        from ..page.page import write_page

        size = write_page(args.run_directories, args.html)
        print(f"{args.html}: {format_bytes(size)}, open it in a browser")
        return 0
    from ..metrics.report import report as text_of

    print("\n\n".join(map(text_of, args.run_directories)))
    return 0


def watch(args: argparse.Namespace) -> int:
    from ..page.live import LiveRuns, runs_in

    runs_in(args.place)
    if args.tui:
        from ..page.terminal import draw

        draw(LiveRuns(args.place))
        return 0
    from ..page.server import PageServer

    try:
        server = PageServer(LiveRuns(args.place), args.host, args.port)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--host {args.host} --port {args.port}: {why}; try another, or --port 0") from error
    print(f"{args.place}: {server.url}  (Ctrl-C ends)", flush=True)
    with server:
        server.serve_forever()
    return 0
