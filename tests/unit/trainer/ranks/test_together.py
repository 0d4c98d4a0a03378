"""What fails on one rank is told by all in the same words, with what helps against it."""

import errno
import os

import pytest

from tests.harness import run_ranks
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.ranks.ranks import Ranks, init_distributed


def failing(number: int) -> None:
    raise OSError(number, os.strerror(number), "/some/file")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "; free some space"),
        (errno.EDQUOT, "; free some space"),
        (errno.EACCES, "; check its permissions, its owner and how it is mounted"),
        (errno.EROFS, "; check its permissions, its owner and how it is mounted"),
        (errno.EIO, ""),
    ],
)
def test_advice_goes_by_the_kind_of_error(number, advice):
    with pytest.raises(UserError) as error:
        Ranks().together(lambda: failing(number), "cannot write it")
    assert str(error.value) == f"/some/file: cannot write it: {os.strerror(number)}{advice}"


def test_what_succeeds_is_given_back_and_other_errors_are_not_hidden():
    assert Ranks().together(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        Ranks().together(lambda: 1 // 0)


ERRORS = {"user": UserError("planted"), "memory": MemoryError()}


def _told(kind: str) -> str:
    ranks = init_distributed()

    def action() -> int:
        if ranks.rank == 1 or kind == "everywhere":
            raise ERRORS.get(kind, OSError(errno.ENOSPC, "No space left on device"))
        return ranks.rank

    try:
        return str(ranks.together(action, where="/output"))
    except UserError as error:
        return str(error)


@pytest.mark.distributed
def test_all_ranks_say_the_same_and_on_which_rank():
    assert run_ranks(2, _told, "user") == ["planted (on rank 1)"] * 2
    assert run_ranks(2, _told, "os") == ["/output: No space left on device (on rank 1); free some space"] * 2
    assert run_ranks(2, _told, "memory") == ["/output: out of memory (on rank 1); fewer ranks on a host need less"] * 2
    assert run_ranks(2, _told, "everywhere") == ["/output: No space left on device; free some space"] * 2
