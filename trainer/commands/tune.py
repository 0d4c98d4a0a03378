"""The verb `tune`: which layout, micro batch, offload and checkpointing is the fastest. Heavy imports wait."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data_prep.errors import UserError
from ..run.quiet import quiet
from .arguments import add_run_arguments, add_verb

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe
    from ..tune.hardware import Device
    from ..tune.search import Candidate, Found

_DESCRIPTION = """\
Predicts the step of every layout that `zeropipe plan` would take: data, tensor, sequence and pipeline parallel, ZeRO
stage, offload, micro batch, activation checkpointing. The global batch, the model and the precision stay as they are.
Prints the fastest that fit, and writes the DeepSpeed JSON of the first.

Arithmetic, memory traffic, communication and pipeline bubbles are counted, not run: a prediction is good for ranking,
within about 15 % of the truth where the machine is what the table says. --measure runs the first few of them here.
"""
_EPILOG = """\
examples:
  zeropipe tune my.yaml --devices 64 --gpu h100 -o ds.json
  zeropipe tune my.yaml --nodes 4 --gpu a100-80 --network 100        100 Gbit/s for each GPU
  zeropipe tune my.yaml --devices 8 --gpu bf16=500,memory=64,bandwidth=1800,nvlink=200
  zeropipe tune my.yaml --devices 2 --measure 3                      this machine, measured

Without --gpu this machine's own products, memory and links are measured first, which takes some seconds.
"""


def register(verbs: argparse._SubParsersAction) -> None:
    text = "rank every legal layout of a run by predicted speed and write the DeepSpeed JSON of the best"
    parser = add_verb(verbs, "tune", run, text, _DESCRIPTION, _EPILOG)
    add_run_arguments(parser, "zero1", " (its layout is replaced, the rest kept)")
    parser.add_argument("--devices", type=int, metavar="N", help="ranks in all, on all nodes")
    parser.add_argument("--nodes", type=int, metavar="N", help="instead of --devices: nodes, each with --gpus-per-node")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="default: 8")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="an accelerator of the table, or its numbers: bf16=TFLOP/s,memory=GB,bandwidth=GB/s[,nvlink=GB/s one way]"
        "[,network=Gbit/s]; default: this machine, measured",
    )
    parser.add_argument("--network", type=float, metavar="GBIT", help="Gbit/s between nodes, for each GPU")
    parser.add_argument("--memory", type=float, metavar="GB", help="of a device, where less of it is free")
    parser.add_argument("--measure", type=int, default=0, metavar="K", help="run a few steps of the first K here")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many to show; default: %(default)s")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the DeepSpeed JSON of the best")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(args: argparse.Namespace) -> int:
    quiet()  # before the libraries are imported
    from ..plan.deepspeed_json import load_pair
    from ..tune.report import device_line, found_lines, found_records
    from ..tune.search import search

    _check_counts(args)
    if args.output is not None and args.output.exists():
        raise UserError(f"--output {args.output}: is there already; choose another name or remove it")
    recipe, ds = load_pair(args.recipe, args.deepspeed_config, args.overrides)
    if args.gpu is None:
        from ..tune.search import base_plan

        base_plan(recipe, ds)  # what is wrong with the run is said before the machine is measured
    devices, device = _devices(args)
    found = search(recipe, ds, devices, device)
    if not found.fitting:
        raise UserError(_nothing_fits(found, device))
    if not args.json:
        print(f"{recipe.name} on {device_line(device, devices)}", flush=True)
    measured = _measured(args, recipe, found)
    best = _best(found, measured)
    if args.json:
        print(json.dumps(found_records(found, args.top, measured), indent=2))
    else:
        print("\n".join(found_lines(found, device, args.top, measured)))
    _hand_over(args, recipe, best, device)
    return 0


def _check_counts(args: argparse.Namespace) -> None:
    for option in ("devices", "nodes", "gpus_per_node", "top"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value}: expected 1 or more")
    if args.measure < 0:
        raise UserError(f"--measure {args.measure}: expected 0 or more")
    for option in ("network", "memory"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise UserError(f"--{option} {value:g}: expected more than 0")
        if value is not None and args.gpu is None and option == "network":
            raise UserError("--network is for --gpu; without it this machine's own links are measured")
    if args.devices is None and args.nodes is None:
        raise UserError("--devices N is missing: ranks in all, on all nodes (or --nodes N)")


def _devices(args: argparse.Namespace) -> tuple[int, Device]:
    """How many ranks, and what each has.

    Raises:
        UserError: --devices and --nodes do not agree, or an unknown accelerator.
    """
    from ..tune.hardware import device_named, parse_device, with_network

    if args.gpu is None:
        if args.nodes not in (None, 1) or args.gpus_per_node not in (None, args.devices):
            raise UserError("this machine is one node; name the accelerator of several with --gpu")
        devices = args.devices or args.gpus_per_node
        if devices is None:
            raise UserError("--devices N is missing: ranks on this machine")
        from ..tune.machine import measure_machine

        return devices, with_network(measure_machine(devices), None, None, args.memory)
    named = parse_device(args.gpu) if "=" in args.gpu else device_named(args.gpu)
    device = with_network(named, args.gpus_per_node, args.network, args.memory)
    whole = None if args.nodes is None else args.nodes * device.per_node
    if None not in (whole, args.devices) and whole != args.devices:
        raise UserError(
            f"--devices {args.devices}, but --nodes {args.nodes} x {device.per_node} GPUs are {whole}; leave one out"
        )
    devices = whole or args.devices
    if devices > device.per_node and devices % device.per_node:
        raise UserError(f"--devices {devices} do not fill nodes of {device.per_node}; say --gpus-per-node")
    return devices, device


def _nothing_fits(found: Found, device: Device) -> str:
    from ...data_prep.sizes import format_bytes

    least = min(found.candidates, key=lambda one: one.memory.peak)
    return (
        f"no plan fits into {format_bytes(device.memory)} a device; the least that one needs is "
        f"{format_bytes(least.memory.peak)}: {least}. Use more devices or a smaller model"
    )


def _measured(args: argparse.Namespace, recipe: Recipe, found: Found) -> dict[Candidate, float | str]:
    """Seconds of a step of the first few, or the word "failed". Real ranks, the run's own data and engine."""
    if not args.measure:
        return {}
    from ..tune.measure import measure_candidate, refuse_elsewhere

    refuse_elsewhere(args.gpu, found.fitting[0].layout.world)
    seconds: dict[Candidate, float | str] = {}
    for one in found.fitting[: args.measure]:
        seconds[one] = measure_candidate(recipe, one)
    return seconds


def _best(found: Found, measured: dict[Candidate, float | str]) -> Candidate:
    """The first; where some were measured, the fastest of those.

    Raises:
        UserError: all that were tried failed.
    """
    ran = {one: seconds for one, seconds in measured.items() if not isinstance(seconds, str)}
    if measured and not ran:
        raise UserError("--measure: every plan that was tried failed: " + "; ".join(map(str, set(measured.values()))))
    return min(ran, key=lambda one: ran[one]) if ran else found.fitting[0]


def _hand_over(args: argparse.Namespace, recipe: Recipe, best: Candidate, device: Device) -> None:
    """Checks the best by `make_plan`, writes its JSON, and prints how to launch it."""
    from ..tune.report import overrides_of, write_ds_json
    from ..tune.search import plan_of_candidate

    plan_of_candidate(recipe, best)
    if args.output is not None:
        write_ds_json(args.output, best.ds)
    if args.json:
        return
    words: list[Any] = ["zeropipe", "launch", args.recipe, "--deepspeed_config", args.output or "ds.json"]
    devices = best.layout.world
    words += ["--devices", devices] if devices <= device.per_node else ["--hostfile", "hostfile"]
    words += overrides_of(best, recipe.parallel.pipeline, recipe.batch.global_batch, args.overrides)
    print(f"\nbest: {best}")
    if args.output is None:
        print("its DeepSpeed JSON (-o FILE writes it)\n" + json.dumps(best.ds, indent=2))
    print("\nto run it\n  " + shlex.join(map(str, words)))
