"""Plans, so that nothing illegal is ever started, then runs `deepspeed … --module zeropipe.trainer`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..data_prep.errors import EXIT_RANK_FAILED, UserError
from ..trainer.commands.arguments import add_run_arguments, add_verb
from ..trainer.ranks.ports import free_port
from .backends import BACKENDS, PDSH, check_backend, check_programs
from .command import Launch, deepspeed_command, forwarded_lines, shell_line, user_environment_files
from .hosts.arguments import add_host_arguments, hosts_of
from .hosts.devices import count_accelerators, visible_devices
from .hosts.hostfile import is_this_machine
from .hosts.selection import select_hosts
from .hosts.sources import hostfile_text
from .running import added_variables, meeting, run_once, sent_by_name
from .supervision.restarts import hosts_that_answer, most_hosts, resume_word
from .supervision.watch import Patience
from .ways.arguments import add_way_arguments, print_way

if TYPE_CHECKING:
    from ..trainer.plan.plan import Plan

MEETING_PORT = 29500  # where nobody can look for a free one on behalf of all; DeepSpeed's and torchrun's own
_EPILOG = """\
examples:
  zeropipe launch gpt2_345m --deepspeed_config zero2 --devices 4
  zeropipe launch my.yaml --deepspeed_config my.json --hostfile hostfile optimizer.lr=3e-4 duration.steps=200

With a hostfile, every host needs: ssh without a password from here, this folder and this Python at the same path, and
the data and the run directory on shared storage; relative paths count from the folder you launch in. OMP_*, GLOO_*,
NCCL_*, HF_*, TORCH_*, CUDA_*, … of your environment and the lines of `.deepspeed_env`, as they are, go to every rank.

Ctrl-C or SIGTERM: the ranks finish the step, save and stop (exit code 4); the same command resumes.
"""


def register(verbs: argparse._SubParsersAction) -> None:
    text = "train on this machine or on every host of a hostfile"
    parser = add_verb(verbs, "launch", run, text, __doc__, _EPILOG)
    add_run_arguments(parser)
    parser.set_defaults(module="zeropipe.trainer")
    add_host_arguments(parser, "hosts to train on; default: this machine")
    parser.add_argument(
        "--devices",
        "--num_accelerators",
        "--num_gpus",
        type=int,
        metavar="N",
        help="ranks on this machine; default: all its accelerators, or 1 on a machine with CPUs only",
    )
    _add_launcher_arguments(parser)
    parser.add_argument("--master_addr", metavar="ADDR", help="address of the first host, as the others reach it")
    parser.add_argument("--master_port", type=int, metavar="PORT", help="for the ranks to find each other")
    parser.add_argument(
        "--bind_cores_to_rank", action="store_true", help="bind each rank to cores of its own (numactl)"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="go on so often, from the newest checkpoint; else 0"
    )
    parser.add_argument(
        "--min-hosts", type=int, metavar="M", help="go on without hosts that do not answer, if M are left; default: all"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command that would be run")
    text = "send recipe, JSON and ZeroPipe's own code to hosts where they are missing or differ"
    parser.add_argument("--sync", action="store_true", help=text)
    add_way_arguments(parser)
    parser.add_argument("--verbose", action="store_true", help="keep DeepSpeed's own messages")


def _add_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    text = "how the ranks of a hostfile are started, all from here; default: pdsh"
    parser.add_argument("--launcher", choices=list(BACKENDS), help=text)
    parser.add_argument(
        "--launcher_args", default="", metavar="WORDS", help="for pdsh, mpirun or srun, in one argument"
    )
    text = "start the ranks of this host alone; the same command is given on every host of the hostfile"
    parser.add_argument("--no_ssh", action="store_true", help=text)
    text = "for --no_ssh: which line of the hostfile this host is, from 0 on; default: the one with its name"
    parser.add_argument("--node_rank", type=int, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    _check_ways(args)
    if args.via:
        return print_way(args)
    launch = plan_launch(args)
    plan = checked_plan(args, launch.devices)
    files = _files_to_compare(plan, launch)
    if args.dry_run:
        print_dry_run(launch, files)
        return 0
    began, whole = time.time(), launch
    for left in range(args.max_restarts, -1, -1):
        print(launch_summary(launch, plan), flush=True)
        session = run_once(launch, plan.recipe.output, files, Patience.of(plan.recipe))
        if session.code != EXIT_RANK_FAILED or session.asked or not left:
            return session.code
        try:
            launch, plan = again(args, whole, plan, began)
        except UserError as error:
            print(f"error: cannot go on: {error}", file=sys.stderr)
            return EXIT_RANK_FAILED
        print(f"going on ({left} of {args.max_restarts} restarts left)", file=sys.stderr, flush=True)
    return EXIT_RANK_FAILED


def again(args: argparse.Namespace, whole: Launch, plan: Plan, began: float) -> tuple[Launch, Plan]:
    """The launch that goes on, from the newest checkpoint, on the hosts of the `whole` that answer, and its plan.

    Raises:
        UserError: fewer than `--min-hosts` (all, if that is not said) answer, or no plan is legal on what is left.
    """
    if (word := resume_word(plan.recipe.output, plan.recipe.resume, began)) is not None:
        args.overrides = [*(said for said in args.overrides if not said.startswith("resume=")), word]
    arguments = plan_launch(args).arguments
    if not whole.remote:
        return replace(whole, arguments=arguments, master_port=args.master_port or free_port()), plan
    alive = hosts_that_answer(whole.hosts, whole.ssh_port)
    least = args.min_hosts or len(whole.hosts)
    if gone := [host.name for host in whole.hosts if host not in alive]:
        print(f"{', '.join(gone)}: no answer by ssh", file=sys.stderr)
    hosts, plan = most_hosts(alive, least, lambda devices: checked_plan(args, devices))
    left_out = {"selected": whole.selected or hosts != whole.hosts, "devices": sum(host.slots for host in hosts)}
    address = whole.master_addr if hosts[0] == whole.hosts[0] else None  # it was the first host's
    return replace(whole, arguments=arguments, hosts=hosts, master_addr=address, **left_out), plan


def _files_to_compare(plan: Plan, launch: Launch) -> list[str]:
    if not launch.remote:
        return []
    from .doctor.quick import files_to_compare

    return files_to_compare(plan.recipe, *launch.arguments)


def _check_ways(args: argparse.Namespace) -> None:
    """Options that say different things of how ranks are started.

    Raises:
        UserError: two that exclude each other, or one without another.
    """
    if args.via and (args.launcher or args.no_ssh):
        raise UserError(f"--via {args.via} prints what others start: leave --launcher and --no_ssh out")
    if args.no_ssh and args.launcher:
        raise UserError("--no_ssh starts ranks on this host alone: leave --launcher out")
    if args.node_rank is not None and not args.no_ssh:
        raise UserError("--node_rank goes with --no_ssh")
    if (args.launcher or args.no_ssh) and not (args.hostfile or args.hosts):
        raise UserError(
            f"{'--no_ssh' if args.no_ssh else '--launcher'}: which hosts are there? give --hostfile or --hosts"
        )
    if args.no_ssh and (args.max_restarts or args.min_hosts or args.sync or args.launcher_args):
        raise UserError(
            "--no_ssh: nobody sees all hosts, so --max-restarts, --min-hosts, --sync and --launcher_args do not go "
            "with it; restart on every host, or launch over ssh"
        )


def plan_launch(args: argparse.Namespace) -> Launch:
    """Where the ranks go, and what each is told.

    Raises:
        UserError: the hostfile, a number of devices that this machine or the hostfile does not have, or a launcher
            that cannot do what is asked.
    """
    words = ["--run", _absolute(args.recipe), "--deepspeed_config", _absolute(args.deepspeed_config)]
    launch = Launch(
        arguments=(*words, *args.overrides),
        devices=1,
        ssh_port=args.ssh_port,
        master_addr=args.master_addr,
        master_port=args.master_port,
        bind_cores=args.bind_cores_to_rank,
        verbose=args.verbose,
        module=args.module,
        sync=args.sync,
        backend=args.launcher or PDSH,
        launcher_args=args.launcher_args,
    )
    given = hosts_of(args, os.environ)
    if given is None:
        return _on_this_machine(launch, args.devices)
    hosts = select_hosts(given, args.include, args.exclude)
    slots = sum(host.slots for host in hosts)
    if args.devices is not None and args.devices != slots:
        where = args.hostfile or args.hosts
        raise UserError(f"--devices {args.devices}, but {where} has {slots} slots; leave --devices out")
    # written when it is known where, if it is not the user's own one; other launchers than pdsh know no --include
    own = args.hostfile and launch.backend == PDSH
    hostfile = Path(args.hostfile).absolute() if own else Path("hostfile")
    launch = replace(launch, hostfile=hostfile, hosts=hosts, devices=slots, selected=hosts != given)
    if args.no_ssh:
        return _on_every_host(launch, args.node_rank)
    here = len(hosts) == 1 and is_this_machine(hosts[0].name) and hosts[0].devices is None
    if here and args.launcher is None:
        return _on_this_machine(replace(launch, hostfile=None, hosts=(), selected=False), slots)
    check_backend(launch.backend, hosts, args.ssh_port)
    if launch.bind_cores:
        raise UserError(
            "--bind_cores_to_rank: DeepSpeed binds ranks of this machine and of --no_ssh only; leave it out"
        )
    return launch


def _on_every_host(launch: Launch, node: int | None) -> Launch:
    """The part of this host, of a launch that is begun on each by itself: they must meet where all of them say."""
    names = [host.name for host in launch.hosts]
    if node is None:
        mine = [number for number, name in enumerate(names) if is_this_machine(name)]
        if len(mine) != 1:
            raise UserError(f"--no_ssh: this host's name is not one of {', '.join(names[:8])}; say --node_rank N")
        (node,) = mine
    if not 0 <= node < len(names):
        raise UserError(f"--node_rank {node}: the hosts are numbered 0 to {len(names) - 1}")
    address, port = launch.master_addr or names[0], launch.master_port or MEETING_PORT
    return replace(launch, node=node, master_addr=address, master_port=port)


def _absolute(name: str) -> str:
    """A file by its full path, so that it means the same wherever a rank starts; a shipped one's name as it is."""
    path = Path(name)
    return str(path.absolute()) if path.exists() else name


def _on_this_machine(launch: Launch, devices: int | None) -> Launch:
    found, visible = count_accelerators(), visible_devices(os.environ)
    at_hand = len(visible) if visible is not None and found else found
    if devices is not None and devices < 1:
        raise UserError(f"--devices {devices}: expected 1 or more")
    if devices is not None and at_hand and devices > at_hand:
        raise UserError(f"--devices {devices}, but this machine offers {at_hand}; use a hostfile for more machines")
    devices = devices or at_hand or 1
    ids = tuple(visible[:devices]) if visible is not None and found else None
    port = launch.master_port or free_port()  # two launches here must not meet on DeepSpeed's default
    return replace(launch, devices=devices, device_ids=ids, master_port=port)


def launch_summary(launch: Launch, plan: Plan) -> str:
    """One line on what is about to start: the ranks take a while to say their first word."""
    where = f"{len(launch.hosts)} hosts" if launch.remote else "this machine"
    ranks = f"{launch.devices} rank{'s' if launch.devices > 1 else ''} on {where} ({plan.layout}, {plan.precision})"
    return f"{plan.recipe.name}: {ranks}, {plan.total_steps:,} steps of {plan.global_batch} x {plan.seq_len} tokens"


def checked_plan(args: argparse.Namespace, devices: int) -> Plan:
    """Plans the run, as `zeropipe plan` does.

    Raises:
        UserError: whatever is wrong with the recipe, the JSON, the data or the layout.
    """
    from ..trainer.plan.deepspeed_json import load_pair
    from ..trainer.plan.plan import make_plan

    return make_plan(*load_pair(args.recipe, args.deepspeed_config, args.overrides), devices)


def print_dry_run(launch: Launch, files: Sequence[str] = ()) -> None:
    """Prints the exact command; hosts are asked where they would meet, and one that cannot take part is told of."""
    if launch.hostfile == Path("hostfile"):
        lines = hostfile_text(launch.hosts).splitlines()
        print("\n".join(["# with this hostfile:", *(f"#   {line}" for line in lines)]))
        launch = replace(launch, selected=False)
    if launch.remote:
        try:
            check_programs(launch.backend)
            launch = meeting(replace(launch, sync=False), None, files)
        except UserError as error:
            print("\n".join(f"# {line}" for line in str(error).splitlines()))
    added = added_variables(launch)
    environment = {**os.environ, **added}
    if launch.shells:
        print("# with these lines in .deepspeed_env of the current folder, which carries them to every host:")
        for line in forwarded_lines(environment, user_environment_files(os.environ)):
            print(f"#   {line}")
    print(shell_line(deepspeed_command(launch, sent_by_name(launch, environment)), added))
