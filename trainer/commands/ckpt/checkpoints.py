"""The verb `ckpt`: looks after checkpoints. Heavy imports wait until an action runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ....data_prep.errors import UserError
from ....data_prep.sizes import format_bytes
from ..arguments import add_verb
from . import exchange


def register(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs, "ckpt", None, "list, verify, prune, import, convert, ask for checkpoints; audit the samples"
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=type(parser))
    listing = add_verb(actions, "ls", _list, "list checkpoints, their step and size")
    verify = add_verb(actions, "verify", _verify, "compare every byte with the manifest")
    prune = add_verb(actions, "prune", _prune, "remove all whole checkpoints but the newest and milestones")
    audit = add_verb(actions, "audit", _audit, "prove that every sample was consumed exactly once and in order")
    for action in (listing, verify, prune):
        action.add_argument("path", metavar="RUN", help="a run directory, its checkpoints/, or one of them")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="how many to keep")
    audit.add_argument("path", metavar="RUN", help="a run directory")
    request = add_verb(actions, "request", _request, "ask a run under way for a checkpoint, at the end of its step")
    request.add_argument("path", metavar="RUN", help="a run directory")
    request.add_argument("--stop", action="store_true", help="and to stop after it")
    request.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help="for it to notice; default: 60")
    exchange.register(actions)


def _list(args: argparse.Namespace) -> int:
    from ...checkpoint.folder import ls

    for item in ls(args.path):
        word = item.problem or ("whole, milestone" if item.milestone else "whole")
        print(f"{item.step:>10}  {format_bytes(item.nbytes):>12}  {word}  {item.path}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ....data_prep.making.bars import Bar
    from ...checkpoint.folder import verify_checkpoints

    with Bar("verify") as bar:
        found = verify_checkpoints(args.path, bar)
    if not found:
        raise UserError(f"{args.path}: no checkpoint here")
    bad = {path: problems for path, problems in found.items() if problems}
    for path in found:
        print(f"{path}: {'DAMAGED' if path in bad else 'whole'}")
    if bad:
        raise UserError("; ".join(problem for problems in bad.values() for problem in problems))
    return 0


def _prune(args: argparse.Namespace) -> int:
    from ...checkpoint.folder import prune, surplus

    removed = surplus(args.path, args.keep)
    prune(removed)
    print("\n".join(f"removed {path}" for path in removed) or "nothing to remove")
    return 0


def _request(args: argparse.Namespace) -> int:
    from ...run.requests import SAVE, STOP, ask

    ask(Path(args.path), STOP if args.stop else SAVE, args.wait)
    print(f"{args.path}: the run saves at the end of its step" + (", and stops" if args.stop else ""))
    return 0


def _audit(args: argparse.Namespace) -> int:
    from ...metrics.audit import audit, audit_text

    print(audit_text(audit(args.path)))
    return 0
