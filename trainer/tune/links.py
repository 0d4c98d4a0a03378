"""Seconds of collectives between ranks, by latency and bandwidth of the slowest link that they cross."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .hardware import Device


@dataclass(frozen=True)
class Links:
    """Ranks that communicate: `size` of them, neighbours `stride` ranks apart (as `ranks.Ranks` orders the axes)."""

    device: Device
    size: int
    stride: int

    @property
    def within(self) -> bool:
        """Whether all are on one node."""
        return self.size * self.stride <= self.device.per_node

    @property
    def bandwidth(self) -> float:
        """Bytes a second of one rank. Between nodes, those of a node have as many ports as there are of them."""
        device = self.device
        if self.within:
            return device.near.bandwidth
        beside = max(1, device.per_node // self.stride)
        return min(device.near.bandwidth, device.far.bandwidth * min(beside, self.size))

    @property
    def latency(self) -> float:
        """Seconds that a collective of the group takes however little it carries."""
        link = self.device.near if self.within else self.device.far
        return link.latency * math.ceil(math.log2(self.size)) if self.size > 1 else 0.0

    def reduce(self, data: float, calls: int = 1) -> float:
        """All-reduce of `data` bytes in `calls` pieces: a reduce-scatter and an all-gather."""
        return 2 * self.gather(data, calls)

    def gather(self, data: float, calls: int = 1) -> float:
        """All-gather to, or reduce-scatter from, `data` bytes on every rank."""
        if self.size == 1:
            return 0.0
        return calls * self.latency + data * (self.size - 1) / self.size / self.bandwidth

    def exchange(self, data: float, calls: int = 1) -> float:
        """All-to-all of `data` bytes that each rank holds."""
        return self.gather(data, calls)

    def send(self, data: float, calls: int = 1) -> float:
        """From one rank to the next."""
        crosses = self.stride >= self.device.per_node
        link = self.device.far if crosses else self.device.near
        return calls * link.latency + data / link.bandwidth if self.size > 1 else 0.0
