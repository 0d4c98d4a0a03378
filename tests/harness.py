"""Real gloo ranks for tests: what the product itself uses to compare layouts, with a shorter patience."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zeropipe.trainer.testing.local_ranks import RankFailed, RankGroup, on_local_ranks

__all__ = ["RankFailed", "RankGroup", "run_ranks"]


def run_ranks(world: int, target: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
    """Calls `target(*args)` on `world` ranks and returns what each returned (picklable), in rank order.

    `target` is a module-level function; it joins the group itself (`init_distributed`). The first rank that raises
    fails the test with its traceback; a hang is killed after `timeout` seconds and fails with the ranks that hung.
    """
    return on_local_ranks(world, target, *args, timeout=timeout)
