"""Process groups: who this rank is on every axis of the layout, and the few reductions that training needs."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.distributed import ProcessGroup

from ...data_prep.errors import UserError, os_problem
from .grid import expert_groups, place_on_axes
from .interface import set_interface
from .late_compiling import compile_when_called
from .ports import free_port

_T = TypeVar("_T")
TIMEOUT = timedelta(minutes=10)  # of every collective, unless the recipe says another


@dataclass(frozen=True)
class Ranks:
    """This process on every axis. Rank order: tensor innermost, then sequence, then data, pipeline outermost.

    A group is None when its axis has size 1. Ranks of one tensor or sequence group read the same samples. The replica
    group holds the same weights and sees different tokens: gradients are summed over it. It is never None in a world of
    more than one rank: to torch, None is the whole world, and DeepSpeed would average unlike weights.

    Neighbours among the replicas can share the experts of each layer, and are an expert group then; the replicas that
    hold the same of them are a holder group.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    data: int = 0
    data_size: int = 1
    tensor: int = 0
    tensor_size: int = 1
    sequence: int = 0
    sequence_size: int = 1
    pipeline: int = 0
    pipeline_size: int = 1
    expert_size: int = 1
    data_group: ProcessGroup | None = field(default=None, compare=False)
    tensor_group: ProcessGroup | None = field(default=None, compare=False)
    sequence_group: ProcessGroup | None = field(default=None, compare=False)
    pipeline_group: ProcessGroup | None = field(default=None, compare=False)
    replica_group: ProcessGroup | None = field(default=None, compare=False)  # data x sequence
    expert_group: ProcessGroup | None = field(default=None, compare=False)
    holder_group: ProcessGroup | None = field(default=None, compare=False)
    device: torch.device = field(default=torch.device("cpu"), compare=False)

    @property
    def replicas(self) -> int:
        """How many ranks hold the same weights and see different tokens."""
        return self.data_size * self.sequence_size

    @property
    def replica(self) -> int:
        """Which of them this is: its place in the replica group."""
        return self.data * self.sequence_size + self.sequence

    @property
    def expert(self) -> int:
        """This rank's place in its expert group."""
        return self.replica % self.expert_size

    def along(self, axis: Literal["tensor", "expert"]) -> tuple[int, int, ProcessGroup | None]:
        """This rank's place among those that share a parameter on an axis, how many they are, and their group."""
        if axis == "expert":
            return self.expert, self.expert_size, self.expert_group
        return self.tensor, self.tensor_size, self.tensor_group

    def holders(self, axis: Literal["tensor", "expert"]) -> tuple[int, int, ProcessGroup | None]:
        """As `along`, of the replicas that hold the same part of a parameter: ZeRO cuts it over them."""
        if axis == "expert" and self.expert_size > 1:
            return self.replica // self.expert_size, self.replicas // self.expert_size, self.holder_group
        return self.replica, self.replicas, self.replica_group

    @property
    def reads_samples(self) -> bool:
        """Whether this rank speaks for its samples: all ranks of a tensor, sequence or pipeline group read the same."""
        return self.tensor == self.sequence == self.pipeline == 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def lay_out(self, tensor: int, sequence: int, pipeline: int, expert: int = 1) -> Ranks:
        """This process on the axes of a layout, with its groups. Collective over the world."""
        ranks = replace(self, **place_on_axes(self.rank, self.world, tensor, sequence, pipeline))
        return (
            ranks
            if expert == 1
            else replace(ranks, expert_size=expert, **expert_groups(ranks.rank, ranks.world, expert))
        )

    def all_sum(self, *values: Sequence[float] | Tensor) -> list[float]:
        """Sums float64 values, given in one or more rows, over all ranks of the world. Collective."""
        # NCCL and gloo both take float64; some accelerators (MPS) do not, and none of those runs DeepSpeed
        total = torch.cat([torch.as_tensor(row, dtype=torch.float64, device=self.device) for row in values])
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather_objects(self, value: object) -> list:
        """Every rank's picklable `value`, in rank order, on every rank: for what is told once. Collective."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def gather_over_stages(self, value: object) -> list:
        """As `gather_objects`, of the ranks that hold the same place in the other stages of a pipeline."""
        if self.pipeline_size == 1:
            return [value]
        values: list = [None] * self.pipeline_size
        dist.all_gather_object(values, value, group=self.pipeline_group)
        return values

    def gather_on_main(self, value: object) -> list:
        """Every rank's picklable `value`, in rank order, on rank 0; nothing on the others. Collective."""
        if self.world == 1:
            return [value]
        # torch's would first gather all sizes on all ranks
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        longest = torch.tensor([len(own)], device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        sent = torch.zeros(int(longest), dtype=torch.uint8, device=self.device)
        sent[: len(own)] = own
        received = [torch.empty_like(sent) for _ in range(self.world)] if self.is_main else None
        dist.gather(sent, received)
        return [pickle.loads(of_rank.cpu().numpy().tobytes()) for of_rank in received or []]

    def deal(self, values: Sequence[_T] | None) -> _T:
        """To each rank its own of rank 0's picklable `values`. Collective."""
        if self.world == 1:
            assert values is not None
            return values[0]
        found: list = [None]
        dist.scatter_object_list(found, list(values) if values is not None and self.is_main else None)
        return found[0]

    def union(self, texts: Sequence[str]) -> list[str]:
        """What any rank says, on every rank; one number where none says anything. Collective."""
        if not any(self.all_sum([len(texts)])):
            return []
        return list(dict.fromkeys(text for of_rank in self.gather_objects(list(texts)) for text in of_rank))

    def of_main(self, value: _T | None) -> _T:
        """Rank 0's picklable `value`, on every rank. Collective."""
        values: list = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def together(self, action: Callable[[], _T], doing: str = "", where: Path | str = "") -> _T:
        """Runs `action` on every rank; where it fails on one, all raise, so that none waits for it. Collective.

        Args:
            doing: what an OSError or MemoryError then prevents, in words ("cannot write the checkpoint").
            where: the path to name if the OSError names none.

        Raises:
            UserError: on every rank alike, so that rank 0 can speak for all: what the error of a rank said, and on
                which rank.
        """
        result, problem, advice = None, None, ""
        try:
            result = action()
        except UserError as error:
            problem = str(error)
        except (OSError, MemoryError) as error:
            problem, advice = os_problem(error, doing, where)
        self.raise_together(problem, advice)
        return result  # type: ignore[return-value]

    def raise_together(self, problem: str | None, advice: str = "") -> None:
        """Raises a UserError on every rank if any has a problem, with what helps against it. Collective."""
        if not any(self.all_sum([problem is not None])):  # a fraction of what words cost
            return
        problems = self.gather_objects((problem, advice))
        found = list(dict.fromkeys(item for item in problems if item[0] is not None))
        everywhere = all(text is not None for text, _ in problems)  # else say on which rank
        told = []
        for text, advice in found:
            rank = "" if everywhere else f" (on rank {problems.index((text, advice))})"
            told.append(text + rank + (f"; {advice}" if advice else ""))
        raise UserError("; ".join(told))

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def accelerator() -> Any:
    """DeepSpeed's accelerator: CUDA where there is one, else the CPU."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def prepare_backend() -> None:
    """Settings that must precede any use of DeepSpeed's communication and optimizers.

    On CPUs DeepSpeed would build a shared-memory extension that leaks 66 MiB of /dev/shm per rank and launch.
    """
    import deepspeed.ops

    compile_when_called()
    if accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]


def init_distributed(
    tensor: int = 1, sequence: int = 1, pipeline: int = 1, expert: int = 1, timeout: timedelta = TIMEOUT
) -> Ranks:
    """Joins the world and lays it out: data parallel is what the other sizes leave. Collective.

    Raises:
        ValueError: the sizes do not divide the world (plans refuse this before launch).
    """
    return join_world(timeout).lay_out(tensor, sequence, pipeline, expert)


def join_world(timeout: timedelta = TIMEOUT) -> Ranks:
    """Joins the process group that the environment describes (a single process when it describes none).

    Args:
        timeout: of every collective, of every group; `waiting_at_most` changes it.
    """
    import deepspeed

    prepare_backend()
    for key, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, default)
    if "MASTER_PORT" not in os.environ:  # alone in the world: any free port will do
        os.environ["MASTER_PORT"] = str(free_port())
    store = set_interface(os.environ, timeout)
    _wait_at_most(timeout)
    device_type, local_rank = accelerator().device_name(), int(os.environ["LOCAL_RANK"])
    if device_type != "cpu":
        accelerator().set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:  # the ranks of a host share its cores
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    deepspeed.init_distributed(
        "gloo" if device_type == "cpu" else accelerator().communication_backend_name(),
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    del store
    world, device = dist.get_world_size(), torch.device(accelerator().current_device_name())
    return Ranks(rank=dist.get_rank(), world=world, data_size=world, local_rank=local_rank, device=device)


@contextlib.contextmanager
def waiting_at_most(minutes: float) -> Iterator[None]:
    """How long a collective of any group of this rank waits for the other ranks, inside."""
    before = c10d.default_pg_timeout
    _wait_at_most(timedelta(minutes=minutes))
    try:
        yield
    finally:
        _wait_at_most(before)


def _wait_at_most(limit: timedelta) -> None:
    """Sets the limit of the groups that there are, and of those to come: DeepSpeed says none when it makes its own, and
    they would take torch's defaults, half an hour with gloo.
    """
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = limit  # type: ignore[attr-defined]
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(limit, group)


def shut_down() -> None:
    """Leaves the process group; without this, some runs abort with signal 6 after they have finished."""
    if dist.is_initialized():
        dist.destroy_process_group()
