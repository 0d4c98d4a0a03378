import errno
import fcntl
import signal
from threading import Thread

import pytest

from tests.harness import run_ranks
from tests.tiny import _train, tiny_json, tiny_recipe, tiny_store
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.ranks.ranks import Ranks
from zeropipe.trainer.run.guard import StopRequest, check_claim, claim


def test_the_run_that_came_last_owns_a_directory(tmp_path):
    check_claim(tmp_path, "first")  # nobody's
    claim(tmp_path, "first")
    check_claim(tmp_path, "first")
    claim(tmp_path, "second")
    check_claim(tmp_path, "second")
    with pytest.raises(UserError, match=r"another run \(process \d+ on .*\) has begun in .* saves nothing more"):
        check_claim(tmp_path, "first")


def _train_without_locks(recipe: dict, ds: dict) -> str:
    """Trains where the file system knows no locks and, as if from another host, a second run begins meanwhile."""
    from zeropipe.trainer.engine.base import Engine

    def no_locks(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = no_locks
    step = Engine.train_step

    def train_step(self, stream, number, stop=False, save=False):
        if number == 2 and self.ranks.is_main:
            claim(self.plan.recipe.output, "other")
        return step(self, stream, number, stop, save)

    Engine.train_step = train_step  # type: ignore[method-assign]
    try:
        return str(_train(recipe, ds))
    except UserError as error:
        return str(error)


@pytest.mark.distributed
def test_two_runs_do_not_mix_where_there_are_no_locks(tmp_path):
    output = tmp_path / "run"
    recipe = tiny_recipe(tiny_store(tmp_path / "store"), output, duration={"steps": 4}, save={"every": 2})
    for said in run_ranks(2, _train_without_locks, recipe, tiny_json("zero1")):
        assert "another run" in said
    assert [path.name for path in (output / "checkpoints").glob("step-*")] == ["step-00000002"]


def test_in_a_thread_that_is_not_the_main_one_signals_stay_with_whom_they_are():
    """Ray trains in such a thread; no thread but the main one may listen."""
    before, found = signal.getsignal(signal.SIGTERM), []

    def trains() -> None:
        with StopRequest(Ranks()) as stop:
            found.append((stop.look(), signal.getsignal(signal.SIGTERM)))

    thread = Thread(target=trains)
    thread.start()
    thread.join()
    assert found == [((False, False), before)]
