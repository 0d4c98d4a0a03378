"""The grid of ranks: places and process groups on the axes of a layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def place_on_axes(rank: int, world: int, tensor: int, sequence: int, pipeline: int) -> dict[str, Any]:
    """Fields of `Ranks` for a rank of a world. Collective over the world.

    Raises:
        ValueError: the sizes do not divide the world.
    """
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
        if size > 1:
            groups[name] = _own_group(rank, grid.movedim(axis, -1).reshape(-1, size))
    replica_group = groups["data"] or groups["sequence"]
    if (sizes["data"] > 1) == (sizes["sequence"] > 1) and world > 1:  # both axes, or a rank alone
        replica_group = _own_group(
            rank, grid.flatten(1, 2).movedim(1, -1).reshape(-1, sizes["data"] * sizes["sequence"])
        )
    return {
        "replica_group": replica_group,
        **coordinates,
        **{f"{name}_size": size for name, size in sizes.items()},
        **{f"{name}_group": group for name, group in groups.items()},
    }


def expert_groups(rank: int, world: int, size: int) -> dict[str, Any]:
    """Fields of `Ranks` in a world of nothing but replicas: expert groups of `size` neighbours. Collective."""
    assert world % size == 0
    grid = torch.arange(world).view(-1, size)
    return {"expert_group": _own_group(rank, grid), "holder_group": _own_group(rank, grid.T)}


def _own_group(rank: int, rows: torch.Tensor) -> ProcessGroup | None:
    """Makes a group of each row, as every rank of the world must, and gives that which a rank is in."""
    own = None
    for members in rows.tolist():
        group = dist.new_group(members)
        if rank in members:
            own = group
    return own  # type: ignore[return-value]  # a member gets no NON_GROUP_MEMBER
