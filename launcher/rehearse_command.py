"""Rehearses faults: a small version of a recipe comes to harm on hosts made of network namespaces of this machine."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..data_prep.errors import UserError, did_you_mean
from ..trainer.commands.arguments import add_run_arguments, add_verb
from .rehearsal.faults import FAULTS

if TYPE_CHECKING:
    from .rehearsal.matrix import Rehearsed

EXIT_FAILED = 1  # some fault did not end as it must
_EPILOG = f"""\
The model is of the recipe's family with few layers and small widths; objective, adapter, ZeRO stage, parallel sizes,
precision and the rest of the JSON are yours, as are the stores; on CPUs. One run goes through all the faults, each
launch resuming it, and in the end its ledger is audited. Faults come at set-up, step, evaluation and save, at random
steps; --times 4 gives each phase its turn. A fault that the run must survive (pause, link-slow, sshd-stopped,
ssh-lost) is followed by a SIGTERM, at which it saves and stops.

faults: {", ".join(FAULTS)}

Needs root, iproute2, OpenSSH and pdsh. exit codes: 0 all as it must be; 1 something is not; 2 the input is wrong.
"""


def register(verbs: argparse._SubParsersAction) -> None:
    text = "proves on hosts made of network namespaces that a launch survives faults, or ends and says why"
    parser = add_verb(verbs, "rehearse", run, text, __doc__, _EPILOG)
    add_run_arguments(parser)
    parser.add_argument("--faults", default="all", metavar="all|NAME,…", help="which; default: all")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="each so often; default: 1")
    parser.add_argument("--hosts", type=int, default=2, metavar="N", help="hosts to make; default: 2")
    parser.add_argument("--seed", type=int, default=0, help="of the places; default: 0")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")


def run(args: argparse.Namespace) -> int:
    from ..trainer.plan.deepspeed_json import load_pair
    from .rehearsal.drive import other_launches
    from .rehearsal.matrix import TABLE_HEADING, Matrix, load_note, write_line
    from .rehearsal.netns import virtual_hosts, what_is_missing
    from .rehearsal.small import write_small

    names = chosen_faults(args.faults)
    if args.hosts < 2 or args.times < 1:
        raise UserError(f"--hosts {args.hosts} --times {args.times}: expected 2 hosts or more, once or more")
    recipe, ds = load_pair(args.recipe, args.deepspeed_config, args.overrides)
    if missing := what_is_missing():
        raise UserError(f"rehearse makes hosts out of network namespaces: {missing}")
    if others := other_launches():
        raise UserError(
            "another launch of this Python environment runs on this machine (process "
            f"{', '.join(map(str, others))}), and `deepspeed` would end it with a rehearsed one; wait for it"
        )
    folder = Path(tempfile.mkdtemp(prefix="rehearse-"))
    slots = write_small(recipe, ds, args.hosts, folder)
    keys = folder / "hosts"
    keys.mkdir()
    lines: list[Rehearsed] = []
    with virtual_hosts(keys, args.hosts, loopback_names=True, dead_interfaces=True) as hosts:
        matrix = Matrix(hosts, slots, folder, args.seed)
        if not args.json:
            print(
                f"{recipe.name}, small: {args.hosts} hosts of {slots} ranks, {load_note()}\n{TABLE_HEADING}", flush=True
            )
        for line in matrix.lines(names, args.times):
            print(write_line(line, args.json), flush=True)
            lines.append(line)
    return _verdict(lines, matrix.audited, folder, args.json)


def _verdict(lines: list[Rehearsed], audited: Callable[[], str], folder: Path, as_json: bool) -> int:
    wrong = sum(bool(line.wrong) for line in lines)
    try:
        ledger, good = audited(), not wrong
    except UserError as error:
        ledger, good = f"the ledger: {error}", False
    if not as_json:
        print(f"{ledger}\n{len(lines) - wrong} of {len(lines)} as it must be")
    if not good:
        print(f"kept: {folder}", file=sys.stderr)
        return EXIT_FAILED
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def chosen_faults(words: str) -> list[str]:
    """The faults that `--faults` names.

    Raises:
        UserError: one that there is not.
    """
    names = list(FAULTS) if words == "all" else [word.strip() for word in words.split(",")]
    for name in names:
        if name not in FAULTS:
            raise UserError(
                f"--faults: there is no {name!r}{did_you_mean(name, FAULTS) or ''}; there are {', '.join(FAULTS)}"
            )
    return names
