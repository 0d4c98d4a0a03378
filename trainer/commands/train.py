"""One rank of a run, and the verb `train`: this process group trains, one process when started alone."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...data_prep.errors import EXIT_DONE, EXIT_RANK_FAILED, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from ..run.exit_notes import note_exit
from ..run.quiet import quiet
from .arguments import DEFAULT_DEEPSPEED_CONFIG

if TYPE_CHECKING:
    from ..plan.plan import Plan

# what gloo and NCCL say where the other end of a connection has gone
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains in this process group; returns the exit code."""
    quiet()  # before the libraries are imported
    arguments = parse(argv)
    os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    try:
        code = run(arguments)
    except UserError as error:  # raised on every rank alike
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        if any(words in str(error) for words in LOST_PEER):
            print(f"rank {rank} lost another rank, which failed or was killed: see there", file=sys.stderr)
        else:
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
        sys.stderr.flush()
        note_exit(EXIT_RANK_FAILED)
        os._exit(EXIT_RANK_FAILED)  # a clean shutdown would wait for ranks that may be gone
    note_exit(code)
    return code


def run(arguments: argparse.Namespace) -> int:
    from ..loop import train
    from ..ranks.ranks import join_world, shut_down

    ranks = join_world()
    try:
        plan = ranks.together(lambda: plan_of(arguments, ranks.world))  # a path may be missing on one host only
        layout = plan.layout
        state = train(plan, ranks.lay_out(layout.tensor, layout.sequence, layout.pipeline))
    except UserError:
        shut_down()
        raise
    shut_down()
    return EXIT_DONE if state.step >= plan.total_steps else EXIT_STOPPED


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="zeropipe.trainer", description=__doc__)
    parser.add_argument("--run", required=True, metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    parser.add_argument(
        "--deepspeed_config",
        default=DEFAULT_DEEPSPEED_CONFIG,
        metavar="JSON",
        help="a file, or the name of a shipped one",
    )
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_args(argv)


def plan_of(arguments: argparse.Namespace, world: int) -> Plan:
    from ..plan.deepspeed_json import load_ds_config
    from ..plan.plan import make_plan
    from ..recipe.recipe import load_recipe

    recipe = load_recipe(arguments.run, arguments.overrides)
    return make_plan(recipe, load_ds_config(arguments.deepspeed_config), world)
