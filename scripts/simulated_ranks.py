"""Many ranks in one process: a thread each, whose collectives exchange values and count what they would send."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from zeropipe.trainer.ranks.ranks import Ranks

_T = TypeVar("_T")


class Parted(Exception):
    """A rank ended or failed while others waited for it in a collective."""


class World:
    """What the ranks meet at: one of them runs at a time, to its next collective, and hands the turn to the next rank.

    Threads that all run at once fight for the interpreter.
    """

    def __init__(self, size: int) -> None:
        # by parity of the collective, so that nobody overwrites what others have still to read
        self._values: tuple[list[Any], list[Any]] = ([None] * size, [None] * size)
        self._met = [0] * size
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._left = False
        self._parted: str | None = None

    def start(self) -> None:
        self._turns[0].release()

    def enter(self, rank: int) -> None:
        """Waits for the rank's first turn."""
        self._turns[rank].acquire()
        self._refuse_if_parted()

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self._left:
            self.give_up("a rank had ended when others called another collective")
        self._refuse_if_parted()
        values = self._values[self._met[rank] % 2]
        values[rank] = value
        self._met[rank] += 1
        self._hand_on(rank)
        self._turns[rank].acquire()
        if rank == 0 and len(set(self._met)) > 1:
            self.give_up("ranks have called different numbers of collectives")
        self._refuse_if_parted()
        return list(values)

    def leave(self, rank: int) -> None:
        """A rank has done its work."""
        self._left = True
        self._hand_on(rank)

    def give_up(self, why: str) -> None:
        """Every rank that waits, or will, is told that there is nothing to wait for."""
        self._parted = self._parted or why
        for turn in self._turns:
            turn.release()

    def _hand_on(self, rank: int) -> None:
        self._turns[(rank + 1) % len(self._turns)].release()

    def _refuse_if_parted(self) -> None:
        if self._parted is not None:
            raise Parted(self._parted)


@dataclass
class Sent:
    """Messages that a rank sends or receives, and their bytes: reductions and broadcasts go along binary trees."""

    messages: int = 0
    nbytes: int = 0

    def add(self, messages: int, nbytes: int) -> None:
        self.messages, self.nbytes = self.messages + messages, self.nbytes + nbytes

    def copy(self) -> Sent:
        return Sent(self.messages, self.nbytes)

    def since(self, before: Sent) -> Sent:
        return Sent(self.messages - before.messages, self.nbytes - before.nbytes)


@dataclass(frozen=True)
class SimulatedRanks(Ranks):
    """A rank of `world_of`. What is inherited (`together`, `union` …) is made of these."""

    world_of: World = field(default_factory=lambda: World(1), compare=False)
    sent: Sent = field(default_factory=Sent, compare=False)

    @property
    def hops(self) -> int:
        """Messages of a rank that is nearest to the root of a tree over all ranks."""
        return math.ceil(math.log2(self.world)) if self.world > 1 else 0

    def all_sum(self, *values: Any) -> list[float]:
        own = [float(value) for row in values for value in row]
        self.sent.add(2 * self.hops, 2 * 8 * len(own))
        return [sum(of_ranks) for of_ranks in zip(*self.world_of.exchange(self.rank, own), strict=True)]

    def gather_objects(self, value: object) -> list:
        self.sent.add(self.world - 1, (self.world - 1) * len(pickle.dumps(value)))
        return self.world_of.exchange(self.rank, value)

    def gather_over_stages(self, value: object) -> list:
        self.sent.add(self.pipeline_size - 1, (self.pipeline_size - 1) * len(pickle.dumps(value)))
        step = self.world // self.pipeline_size
        return self.world_of.exchange(self.rank, value)[self.rank % step :: step]

    def gather_on_main(self, value: object) -> list:
        found = self.world_of.exchange(self.rank, value)
        self.sent.add(2 * self.hops, 16)  # the longest
        self._to_or_from_main([len(pickle.dumps(of_rank)) for of_rank in found] if self.is_main else [], value)
        return found if self.is_main else []

    def deal(self, values: Sequence[_T] | None) -> _T:
        dealt = self.world_of.exchange(self.rank, values if self.is_main else None)[0]
        self.sent.add(self.hops, 8)
        self._to_or_from_main([len(pickle.dumps(value)) for value in dealt] if self.is_main else [], dealt[self.rank])
        return dealt[self.rank]

    def of_main(self, value: _T | None) -> _T:
        found = self.world_of.exchange(self.rank, value if self.is_main else None)[0]
        self.sent.add(2 * self.hops, len(pickle.dumps(found)) * (1 if not self.is_main else self.hops))
        return found

    def barrier(self) -> None:
        self.world_of.exchange(self.rank, None)
        self.sent.add(2 * self.hops, 0)

    def _to_or_from_main(self, sizes: Sequence[int], value: object) -> None:
        if self.is_main:
            self.sent.add(self.world - 1, sum(sizes))
        else:
            self.sent.add(1, len(pickle.dumps(value)))


def on_simulated_ranks(world: int, work: Callable[[SimulatedRanks], _T]) -> list[tuple[_T, Sent]]:
    """What `work` returns on every data-parallel rank of a world, and what it sent there."""
    meeting = World(world)

    def of_rank(rank: int) -> tuple[_T, Sent]:
        ranks = SimulatedRanks(rank=rank, world=world, data=rank, data_size=world, world_of=meeting)
        try:
            meeting.enter(rank)
            found = work(ranks)
            meeting.leave(rank)
            return found, ranks.sent
        except BaseException as error:
            meeting.give_up(f"rank {rank} failed: {error!r}")
            raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(of_rank, rank) for rank in range(world)]
        meeting.start()
        failed = [error for future in futures if (error := future.exception()) is not None]
    for error in failed:
        if not isinstance(error, Parted):
            raise error
    if failed:
        raise failed[0]
    return [future.result() for future in futures]
