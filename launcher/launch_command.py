"""Plans, so that nothing illegal is ever started, then runs `deepspeed … --module zeropipe.trainer`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..data_prep.errors import EXIT_RANK_FAILED, UserError
from ..trainer.commands.arguments import add_run_arguments, add_verb
from ..trainer.keeper.wire import LAUNCH_FOLDER
from ..trainer.ranks.ports import free_port
from .command import (
    Launch,
    deepspeed_command,
    forwarded_lines,
    rank_environment,
    shell_line,
    user_environment_files,
)
from .hosts.arguments import add_host_arguments, hosts_of
from .hosts.devices import count_accelerators, cpu_cores, visible_devices
from .hosts.hostfile import is_this_machine
from .hosts.selection import select_hosts
from .hosts.sources import hostfile_text
from .supervision.restarts import hosts_that_answer, most_hosts, resume_word
from .supervision.session import Session
from .supervision.watch import Patience
from .ways.arguments import add_way_arguments, print_way

if TYPE_CHECKING:
    from ..trainer.plan.plan import Plan

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


def run(args: argparse.Namespace) -> int:
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


def plan_launch(args: argparse.Namespace) -> Launch:
    """Where the ranks go, and what each is told.

    Raises:
        UserError: the hostfile, or a number of devices that this machine or the hostfile does not have.
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
    )
    given = hosts_of(args, os.environ)
    if given is None:
        return _on_this_machine(launch, args.devices)
    hosts = select_hosts(given, args.include, args.exclude)
    slots = sum(host.slots for host in hosts)
    if args.devices is not None and args.devices != slots:
        where = args.hostfile or args.hosts
        raise UserError(f"--devices {args.devices}, but {where} has {slots} slots; leave --devices out")
    if len(hosts) == 1 and is_this_machine(hosts[0].name) and hosts[0].devices is None:
        return _on_this_machine(launch, slots)
    hostfile = Path(args.hostfile).absolute() if args.hostfile else Path("hostfile")  # written when it is known where
    return replace(launch, hostfile=hostfile, hosts=hosts, devices=slots, selected=hosts != given)


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
    if launch.remote:
        if launch.hostfile == Path("hostfile"):
            lines = hostfile_text(launch.hosts).splitlines()
            print("\n".join(["# with this hostfile:", *(f"#   {line}" for line in lines)]))
        try:
            launch = meeting(replace(launch, sync=False), None, files)
        except UserError as error:
            print("\n".join(f"# {line}" for line in str(error).splitlines()))
    added = rank_environment(os.environ, launch, count_accelerators(), cpu_cores())
    if launch.remote:
        print("# with these lines in .deepspeed_env of the current folder, which carries them to every host:")
        for line in forwarded_lines({**os.environ, **added}, user_environment_files(os.environ)):
            print(f"#   {line}")
    print(shell_line(deepspeed_command(launch), added))


def meeting(launch: Launch, folder: Path | None, files: Sequence[str], output: Path | None = None) -> Launch:
    """The launch with address and port for its ranks to meet at, after a look at every host.

    Raises:
        UserError: a host cannot take part.
    """
    from .doctor.quick import check_hosts

    found = check_hosts(launch.hosts, launch.ssh_port, folder, files, output, launch.sync)
    return replace(
        launch, master_addr=launch.master_addr or found.address, master_port=launch.master_port or found.port
    )


def _with_hostfile(launch: Launch, folder: Path) -> Launch:
    """The launch with a hostfile written into its folder, where its hosts came from an allocation."""
    if launch.hostfile is None or launch.hostfile.is_absolute():
        return launch
    hostfile = folder / "hostfile"
    hostfile.write_text(hostfile_text(launch.hosts), encoding="ascii")
    return replace(launch, hostfile=hostfile, selected=False)


def start(launch: Launch, output: Path, files: Sequence[str] = ()) -> int:
    """Runs the launch and returns its exit code; `files` must be the same on every host."""
    return run_once(launch, output, files, Patience()).code


def run_once(launch: Launch, output: Path, files: Sequence[str], patience: Patience) -> Session:
    """Runs the launch to its end; raises as `meeting`."""
    with launch_folder(output.absolute() if launch.remote else None) as folder:
        if launch.remote:
            launch = meeting(_with_hostfile(launch, folder), folder, files, output)
        session = Session(folder, launch.devices, launch.hosts, launch.ssh_port, patience)
        session.run(deepspeed_command(launch), child_environment(launch, folder))
        return session


@contextmanager
def launch_folder(shared: Path | None) -> Iterator[Path]:
    """A folder for this launch alone, removed at its end: in the run directory where other hosts must see it too."""
    made = []
    if shared is not None:
        made = [path for path in (shared, *shared.parents) if not path.exists()]
        shared.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".launch-", dir=shared))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:  # a launch that has failed before its ranks wrote anything leaves no trace
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def child_environment(launch: Launch, folder: Path) -> dict[str, str]:
    """The environment of `deepspeed`: the user's, the ranks' settings, and the mark of this launch."""
    environment = {name: value for name, value in os.environ.items() if name not in {"RANK", "LOCAL_RANK"}}
    environment |= rank_environment(environment, launch, count_accelerators(), cpu_cores())
    environment[LAUNCH_FOLDER] = str(folder)
    if launch.device_ids is not None:
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # said by --include
    if launch.remote:
        lines = forwarded_lines(environment, user_environment_files(environment))
        carrier = folder / "deepspeed_env"
        carrier.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        environment["DS_ENV_FILE"] = str(carrier)
        own = environment.get("PDSH_SSH_ARGS_APPEND", "")
        # a dead link is noticed, and nobody is asked for a password
        environment["PDSH_SSH_ARGS_APPEND"] = (
            f"{own} -o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
        )
    return environment
