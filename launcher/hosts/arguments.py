"""Options that say which hosts, alike for every verb that asks some."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ...data_prep.errors import UserError
from .hostfile import Host, read_hostfile
from .sources import SOURCES, hosts_from


def add_host_arguments(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--hostfile", "-H", metavar="FILE", help=text)
    parser.add_argument(
        "--hosts",
        metavar="WHENCE",
        help=f"instead: {', '.join(SOURCES)} (what it gave out), or an MPI or PBS node file",
    )
    parser.add_argument(
        "--include", metavar="WORDS", help="only these: node1@node2:0,2 is all of node1 and two devices"
    )
    parser.add_argument("--exclude", metavar="WORDS", help="all but these")
    parser.add_argument("--ssh_port", type=int, metavar="PORT", help="of the hosts; default: as ssh is configured")


def hosts_of(args: argparse.Namespace, environ: Mapping[str, str]) -> tuple[Host, ...] | None:
    """All the hosts that the options name, before any is left out; None: this machine.

    Raises:
        UserError: they contradict each other, or name no hosts.
    """
    if args.hostfile and args.hosts:
        raise UserError("--hostfile and --hosts: give one of them")
    if args.hostfile:
        return read_hostfile(args.hostfile)
    if args.hosts:
        return hosts_from(args.hosts, environ)
    if args.include or args.exclude:
        raise UserError("--include and --exclude choose among the hosts of --hostfile or --hosts")
    return None
