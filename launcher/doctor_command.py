"""Looks at every host before money is spent on it: what is missing, what differs, what is slow, and what mends it."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from ..data_prep.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from ..trainer.commands.arguments import add_verb
from .command import forwarded_variables
from .hosts.arguments import add_host_arguments, hosts_of
from .hosts.devices import count_accelerators
from .hosts.hostfile import Host
from .hosts.selection import select_hosts

_EPILOG = """\
examples:
  zeropipe doctor                                        this machine
  zeropipe doctor --hostfile hostfile                    every host of it, ending with a real all-reduce
  zeropipe doctor --hostfile hostfile --shared runs      also: that all hosts share runs/, and that locks work there

Exit code 0: a launch on these hosts can start; 2: it cannot, for the reasons said.
"""


def register(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs, "doctor", run, "look at every host of a hostfile: what a launch would fail on", __doc__, _EPILOG
    )
    add_host_arguments(parser, "hosts to look at; default: this machine")
    parser.add_argument(
        "--shared", default=".", metavar="FOLDER", help="where run directories will be, on all hosts; default: here"
    )
    parser.add_argument(
        "--files", nargs="*", default=[], metavar="FILE", help="must be the same on all hosts: recipes, manifests, …"
    )
    parser.add_argument("--seconds", type=float, default=30, help="to wait for any one answer; default: %(default)g")
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def run(args: argparse.Namespace) -> int:
    from .doctor.case import Case
    from .doctor.crew import local_crew, ssh_crew
    from .doctor.examine import examine
    from .doctor.report import doctor_report, examination_json

    given = hosts_of(args, os.environ)
    alone = (Host("localhost", count_accelerators() or 1),)
    hosts = alone if given is None else select_hosts(given, args.include, args.exclude)
    shared = Path(args.shared).absolute()
    if not shared.is_dir():
        raise UserError(
            f"--shared {args.shared}: no such folder; make it, or name the one that run directories will be in"
        )
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=shared))
    try:
        case = Case(hosts, args.files, str(shared), folder, forwarded_variables(os.environ), args.seconds)
        crew = local_crew() if given is None else ssh_crew(hosts, args.ssh_port)
        found = examine(case, crew, thorough=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(examination_json(found) if args.json else doctor_report(found))
    return EXIT_USER_ERROR if found.fatal else EXIT_DONE
