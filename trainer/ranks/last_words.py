"""Whether ranks that end do so for the same reason."""

from __future__ import annotations

import contextlib
import hashlib
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def same_on_all_ranks(words: str, seconds: float = 5.0, occasion: str = "last_words") -> bool:
    """Whether all ranks come here with these words, each waiting for the others for at most `seconds`.

    Asks the store that the ranks met at, since a rank that waits in a collective cannot answer there; a few messages a
    rank, however many there are.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    store, patience = c10d._get_default_store(), timedelta(seconds=seconds)

    def all_come_to(place: str) -> None:
        if store.add(place, 1) == dist.get_world_size():
            store.set(f"{place}/all", "")
        store.wait([f"{place}/all"], patience)

    try:
        all_come_to(f"{occasion}/{hashlib.sha256(words.encode()).hexdigest()}")
    except RuntimeError:  # some rank is elsewhere, or gone with the store
        return False
    with contextlib.suppress(RuntimeError):
        all_come_to(f"{occasion}/read")  # rank 0 holds the store, and must not go first
    return True
