"""How the ranks fared in a step, as its record holds it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ..run.state import Fared

MOST_HOSTS = 16  # in a record: of more hosts, those that fared worst


def by_host(fared: Sequence[Fared], hosts: Sequence[str]) -> dict[str, Any]:
    """The slowest rank, the longest wait for data, and of each host the worst of its ranks. Nothing of nobody.

    Args:
        fared: by rank; hosts: the name of each rank's.
    """
    if not fared:
        return {}
    members: dict[str, list[Fared]] = {}
    for host, own in zip(hosts, fared, strict=True):
        members.setdefault(host, []).append(own)
    worst = {host: Fared(*map(max, zip(*own, strict=True))) for host, own in members.items()}
    listed = sorted(worst, key=lambda host: worst[host], reverse=True)[:MOST_HOSTS]
    found: dict[str, Any] = {"hosts": {host: worst[host]._asdict() for host in sorted(listed)}}
    seconds = [own.forward_seconds for own in fared]
    if any(seconds):
        found["slowest_rank"] = seconds.index(max(seconds))
        found["slowest_forward_seconds"], found["median_forward_seconds"] = max(seconds), median(seconds)
    found["most_data_seconds"] = max(own.data_seconds for own in fared)
    found["most_memory"] = max(own.memory for own in fared)
    return found
