"""Worker ranks of an MPI job, on any number of hosts that share the file system."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import cast

from ..errors import UserError


@contextmanager
def ranks() -> Iterator[Executor | None]:
    """On rank 0 an executor served by all other ranks; on those None, after they have served until rank 0 left.

    A crash of rank 0 ends the whole job, where plain MPI would leave the others waiting for ever.
    """
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise UserError(f"--mpi needs mpi4py and an MPI library that it finds: {error}") from None
    if MPI.COMM_WORLD.size < 2:
        raise UserError("--mpi: start it with `mpirun -n 2` or more: one rank leads, the others work")
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        try:
            yield cast("Executor | None", executor)
        except UserError:
            raise
        except BaseException:
            import traceback

            traceback.print_exc()
            MPI.COMM_WORLD.Abort(1)
