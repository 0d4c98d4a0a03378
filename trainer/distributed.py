"""Process groups: who this rank is on every axis of the layout, and the few reductions that training needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Ranks:
    """This process on every axis. Rank order: tensor innermost, then sequence, then data, pipeline outermost.

    A group is None when its axis has size 1. Ranks of one tensor or sequence group read the same samples.
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
    data_group: ProcessGroup | None = field(default=None, compare=False)
    tensor_group: ProcessGroup | None = field(default=None, compare=False)
    sequence_group: ProcessGroup | None = field(default=None, compare=False)
    pipeline_group: ProcessGroup | None = field(default=None, compare=False)
    device: torch.device = field(default=torch.device("cpu"), compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Sums float64 values over all ranks of the world. Collective."""
        # NCCL and gloo both take float64; some accelerators (MPS) do not, and none of those runs DeepSpeed
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def all_true(self, verdict: bool) -> bool:
        """Whether every rank says True. Collective."""
        return self.all_sum([0.0 if verdict else 1.0])[0] == 0.0

    def gather_objects(self, value: object) -> list:
        """Every rank's picklable `value`, in rank order, on every rank. Collective; for small things only."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def prepare_backend() -> None:
    """Settings that must precede any use of DeepSpeed's communication.

    On CPUs DeepSpeed would build a shared-memory extension that leaks 66 MiB of /dev/shm per rank and launch.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]


def init_distributed(
    tensor: int = 1, sequence: int = 1, pipeline: int = 1, timeout: timedelta = timedelta(minutes=10)
) -> Ranks:
    """Joins the process group that the environment describes (a single process when it describes none).

    Args:
        tensor, sequence, pipeline: parallel sizes; data parallel is what is left of the world.
        timeout: of every collective, of every group.

    Raises:
        ValueError: the sizes do not divide the world (plans refuse this before launch).
    """
    import deepspeed
    import torch.distributed.distributed_c10d as c10d
    from deepspeed.accelerator import get_accelerator

    prepare_backend()
    for key, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, default)
    if "MASTER_PORT" not in os.environ:  # alone in the world: any free port will do
        os.environ["MASTER_PORT"] = _free_port()
    # sub-groups made without a timeout take the module's default, or a cut link hangs them
    c10d.default_pg_timeout = timeout
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(
        accelerator.communication_backend_name() if accelerator.device_name() != "cpu" else "gloo",
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    device = torch.device(accelerator.current_device_name())
    return _lay_out(dist.get_rank(), dist.get_world_size(), local_rank, tensor, sequence, pipeline, device)


def _lay_out(
    rank: int, world: int, local_rank: int, tensor: int, sequence: int, pipeline: int, device: torch.device
) -> Ranks:
    if world % (tensor * sequence * pipeline):
        raise ValueError(f"{world} ranks cannot hold tensor {tensor} x sequence {sequence} x pipeline {pipeline}")
    sizes = {
        "pipeline": pipeline,
        "data": world // (tensor * sequence * pipeline),
        "sequence": sequence,
        "tensor": tensor,
    }
    grid = torch.arange(world).reshape(tuple(sizes.values()))
    coordinates = dict(zip(sizes, (int(i) for i in (grid == rank).nonzero()[0]), strict=True))
    groups: dict[str, ProcessGroup | None] = dict.fromkeys(sizes)
    for axis, (name, size) in enumerate(sizes.items()):
        if size == 1:
            continue
        for members in grid.movedim(axis, -1).reshape(-1, size).tolist():
            group = dist.new_group(members)  # collective over the world: every rank makes every group
            if rank in members:
                groups[name] = group
    return Ranks(
        rank=rank,
        world=world,
        local_rank=local_rank,
        device=device,
        **coordinates,
        **{f"{name}_size": size for name, size in sizes.items()},
        **{f"{name}_group": group for name, group in groups.items()},
    )


def shut_down() -> None:
    """Leaves the process group; without this, some runs abort with signal 6 after they have finished."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
