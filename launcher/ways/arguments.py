"""`--via`: the options of `launch` that print what others start, and the printing."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ...data_prep.errors import UserError
from ..command import forwarded_variables
from ..hosts.arguments import hosts_of
from ..hosts.hostfile import Host
from ..hosts.selection import select_hosts
from .scripts import WAYS, Start, written_for


def add_way_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--via", choices=WAYS, help="with --dry-run: print an sbatch script, the torchrun line of each host, a TrainJob"
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="for --via without a hostfile, with --devices of each")
    parser.add_argument("--image", default="zeropipe", help="for --via kubeflow; default: %(default)s (see Dockerfile)")


def print_way(args: argparse.Namespace) -> int:
    """Plans the run as for any launch, and prints what starts it.

    Raises:
        UserError: the plan is not legal, or no number of nodes and devices is said.
    """
    from ...trainer.plan.deepspeed_json import load_pair
    from ...trainer.plan.plan import make_plan

    if not args.dry_run:
        raise UserError(f"--via {args.via} prints what others start: add --dry-run")
    hosts = _nodes(args)
    pair = load_pair(args.recipe, args.deepspeed_config, args.overrides)
    plan = make_plan(*pair, sum(host.slots for host in hosts))
    named = (args.recipe, args.deepspeed_config)
    files = [str(Path(name).absolute()) if Path(name).exists() else name for name in named]
    start = Start(
        name=plan.recipe.name,
        words=[files[0], "--deepspeed_config", files[1], *args.overrides],
        hosts=hosts,
        environment=forwarded_variables(os.environ) | _on_cpus(os.environ.get("DS_ACCELERATOR")),
        gpu=os.environ.get("DS_ACCELERATOR") != "cpu",
        master_addr=args.master_addr,
        master_port=args.master_port or 29500,
        image=args.image,
    )
    print(written_for(args.via, start))
    return 0


def _nodes(args: argparse.Namespace) -> tuple[Host, ...]:
    given = hosts_of(args, os.environ)
    if given is not None:
        return select_hosts(given, args.include, args.exclude)
    if not args.nodes or not args.devices:
        raise UserError(f"--via {args.via}: on how many? --nodes N --devices M (of each), or --hostfile FILE")
    if args.nodes < 1 or args.devices < 1:
        raise UserError(f"--nodes {args.nodes} --devices {args.devices}: expected 1 or more")
    return tuple(Host(f"node{i + 1}", args.devices) for i in range(args.nodes))


def _on_cpus(accelerator: str | None) -> dict[str, str]:
    """DS_ACCELERATOR is true of one host only, unless it was said for ranks that others start."""
    return {"DS_ACCELERATOR": accelerator} if accelerator else {}
