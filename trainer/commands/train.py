"""One rank of a run, and the verb `train`: this process group trains, one process when started alone."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta

from ...data_prep.command_line import Parser
from ...data_prep.errors import EXIT_DONE, EXIT_RANK_FAILED, EXIT_STOPPED, EXIT_USER_ERROR, RankFault, UserError
from ..keeper.kept import say_last
from ..ranks.variables import adopt_variables
from ..run.quiet import quiet
from .arguments import DEFAULT_DEEPSPEED_CONFIG, add_run_arguments, add_verb

# what gloo and NCCL say where the other end of a connection has gone
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains in this process group; returns the exit code."""
    return _exit_code_of(lambda: _train(parse_rank(argv)))


def register(verbs: argparse._SubParsersAction) -> None:
    text = "train in this process group: one process when started alone"
    add_run_arguments(add_verb(verbs, "train", run, text))


def run(args: argparse.Namespace) -> int:
    return _exit_code_of(lambda: _train(args))


def rank_parser() -> Parser:
    """The command line of one rank, as `deepspeed` makes it."""
    parser = Parser(prog="zeropipe.trainer", description=__doc__)
    # torchrun takes `--run` for an abbreviation of its own `--run-path`, wherever it stands
    parser.add_argument(
        "--run", dest="recipe", metavar="RECIPE", help="the recipe; or as the first word, as for `train`"
    )
    parser.add_argument("--deepspeed_config", default=DEFAULT_DEEPSPEED_CONFIG, metavar="JSON", help="as for `train`")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `train`")
    return parser


def parse_rank(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of one rank, with `--run RECIPE` or the recipe as its first word.

    Raises:
        UserError: no recipe is named.
    """
    args = rank_parser().parse_intermixed_args(argv)  # words may stand on both sides of an option
    if args.recipe is None:
        if not args.overrides or "=" in args.overrides[0]:
            raise UserError("no recipe; expected --run RECIPE, or RECIPE as the first word")
        args.recipe, *args.overrides = args.overrides
    return args


def _exit_code_of(rank: Callable[[], int]) -> int:
    """How a rank ended, said once: by rank 0 where all ranks found the same wrong, by the rank itself otherwise."""
    quiet()  # before the libraries are imported
    try:
        code = rank()
    except (UserError, RankFault) as error:
        code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_RANK_FAILED
        _tell(error, code)
    except Exception as error:
        number = os.environ.get("RANK", "0")
        if any(words in str(error) for words in LOST_PEER):
            say_last(f"rank {number} lost another rank, which failed or was killed: see there", consequence=True)
        else:
            over = os.environ.get("GLOO_SOCKET_IFNAME")
            where = f" (the interface is GLOO_SOCKET_IFNAME={over})" if "connectFullMesh" in str(error) else ""
            say_last(f"rank {number} failed:\n{traceback.format_exc().strip()}{where}")
        os._exit(EXIT_RANK_FAILED)  # a clean shutdown would wait for ranks that may be gone
    return code


def _tell(error: Exception, code: int) -> None:
    """Says it once where all ranks found the same wrong; a rank that is alone with it says so and ends, so that those
    that wait for it hear of it.
    """
    number = os.environ.get("RANK", "0")
    if "torch" in sys.modules:  # else this process has joined no others
        from ..ranks.last_words import same_on_all_ranks
        from ..ranks.ranks import shut_down

        if not same_on_all_ranks(str(error)):
            say_last(f"error: {error} (on rank {number})")
            os._exit(code)
        shut_down()
    if number == "0":
        say_last(f"error: {error}")


def _train(arguments: argparse.Namespace) -> int:
    from ..loop import train
    from ..plan.deepspeed_json import load_pair
    from ..plan.plan import make_plan
    from ..ranks.ranks import TIMEOUT, join_world, shut_down

    adopt_variables(os.environ)
    os.environ.setdefault("LOCAL_RANK", str(getattr(arguments, "local_rank", 0)))
    pair, problem = None, None
    try:
        pair = load_pair(arguments.recipe, arguments.deepspeed_config, arguments.overrides)
    except UserError as error:  # told when all have met: a file may be missing on one host only
        problem = str(error)
    ranks = join_world(TIMEOUT if pair is None else timedelta(minutes=pair[0].parallel.timeout))
    ranks.raise_together(problem)
    assert pair is not None
    plan = ranks.together(lambda: make_plan(*pair, ranks.world))
    layout = plan.layout
    state = train(plan, ranks.lay_out(layout.tensor, layout.sequence, layout.pipeline, layout.expert))
    shut_down()
    return EXIT_DONE if state.step >= plan.total_steps else EXIT_STOPPED
