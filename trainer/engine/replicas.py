"""Weights that several ranks hold copies of, compared: a bit that flipped in one of them is found and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ...data_prep.errors import RankFault
from ..metrics.record import RunLog
from ..run.state import TrainState
from .base import Engine

ABSENT = torch.iinfo(torch.int64).min
KEY = tuple[str, int]  # a parameter, and which part of it, where ranks share it


class Replicas:
    """Every `check_replicas` steps: one reduction over the world of a checksum of each parameter."""

    def __init__(self, engine: Engine, log: RunLog) -> None:
        self._engine, self._log, self._every = engine, log, engine.plan.recipe.check_replicas
        self._keys: list[KEY] = []  # of the whole world, once they have been asked for
        self._agreed = 0  # step at which all copies were last the same

    def check_if_due(self, state: TrainState) -> None:
        """Collective.

        Raises:
            RankFault: on every rank: copies of a weight differ.
        """
        if not self._every or state.step % self._every:
            return
        ranks, sums = self._engine.ranks, self._checksums()
        if not self._keys:
            told = ranks.gather_on_main(list(sums) if ranks.holders("expert")[0] == 0 else [])
            self._keys = ranks.of_main(sorted({key for keys in told for key in keys}))
        mine = torch.tensor([sums.get(key, ABSENT) for key in self._keys], dtype=torch.int64)
        # the complement turns the order round, so that one maximum finds the smallest, too
        row = torch.cat([mine, torch.where(mine == ABSENT, ABSENT, ~mine)]).to(ranks.device)
        dist.all_reduce(row, dist.ReduceOp.MAX)
        largest, smallest = row.cpu().chunk(2)
        unlike = [key for key, bad in zip(self._keys, (largest != ~smallest).tolist(), strict=True) if bad]
        if not unlike:
            self._agreed = state.step
            return
        found = ranks.gather_objects({key: sums[key] for key in unlike if key in sums})
        hosts = [host["host"] for host in ranks.of_main(self._log.hosts)]
        raise RankFault(self._told(state.step, unlike, found, hosts))

    def _checksums(self) -> dict[KEY, int]:
        """Of each parameter, or part of one, of which this rank holds the whole."""
        named, ranks = self._engine.named_parameters(), self._engine.ranks
        specs = [p.spec for _, p in named]  # type: ignore[attr-defined]
        keys = [(spec.name, 0 if spec.split is None else ranks.along(spec.axis)[0]) for spec in specs]
        values = torch.stack([checksum(p.data) for _, p in named]).tolist()  # waits for the device once
        return dict(zip(keys, values, strict=True))

    def _told(self, step: int, unlike: list[KEY], found: list[Mapping[KEY, int]], hosts: list[str]) -> str:
        name, part = unlike[0]
        held = {rank: sums[name, part] for rank, sums in enumerate(found) if (name, part) in sums}
        (most, count), *_ = Counter(held.values()).most_common()
        odd = [rank for rank, value in held.items() if value != most]
        more = f" and {len(unlike) - 1} more parameters" if len(unlike) > 1 else ""
        if count * 2 > len(held):
            which = " and ".join(f"rank {rank} on {hosts[rank]}" for rank in odd[:3])
            which += f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            said = f"{which} has other values than the {count} ranks that agree; take it out"
        else:
            which = " and ".join(f"rank {rank} on {hosts[rank]}" for rank in list(held)[:4])
            said = f"{which} differ, and with so few nobody can tell which is right"
        return (
            f"step {step}: the copies of {name}{more} are no longer the same: {said}. Memory or a device is at fault; "
            f"go on from a checkpoint of step {self._agreed} or before, at which all agreed (resume=PATH)"
        )


def checksum(tensor: Tensor) -> Tensor:
    """int64 scalar on the tensor's device: the sum of its words, which any single flipped bit changes."""
    flat, size = tensor.contiguous().view(-1), tensor.element_size()
    eights = flat.storage_offset() * size % 8 == flat.numel() * size % 8 == 0  # sums of those are many times as fast
    words = torch.int64 if eights else {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return flat.view(words).sum(dtype=torch.int64)
