"""Saving and loading need little memory: at most one whole parameter beyond a rank's own share."""

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.checkpoint_engine import EngineCase, TinyEngine
from tests.harness import run_ranks
from tests.saving import save
from zeropipe.trainer.checkpoint.deepspeed_state import Live
from zeropipe.trainer.checkpoint.loader import load
from zeropipe.trainer.checkpoint.writer import SnapshotWriter

pytestmark = pytest.mark.distributed

VOCAB = 65_536  # times 64 fp32: a parameter of 16 MiB, and hardly anything else
PARAMETER = VOCAB * 64 * 4
SLACK = 8 << 20  # bytes; what the interpreter and the allocator take


def _anonymous() -> int:
    """Bytes of this process's own memory; mapped files, which the kernel can drop, are not counted."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def _growth(action: Callable[[], object]) -> int:
    """Highest memory while `action` runs, above that before it, in bytes."""
    gc.collect()
    before = peak = _anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    peak = max(peak, _anonymous())
    done.set()
    watcher.join()
    return peak - before


def _measure(layout: EngineCase, output: Path) -> tuple[int, int, int, int]:
    ctypes.CDLL(None).mallopt(
        -3, 1 << 20
    )  # M_MMAP_THRESHOLD: what is freed goes back, and does not blur the next figure
    engine = TinyEngine(layout, vocab=VOCAB)
    engine.step(0)
    live = Live(engine.deepspeed, engine.parameters, engine.ranks)
    waiting = _growth(lambda: save(live, output, {"step": 1}, background=False))
    path = output / "checkpoints" / "step-00000001"
    load(live, path)  # warms the allocator up
    loading = _growth(lambda: load(live, path))
    writer = SnapshotWriter(output, None, None, total_steps=0)

    def copying() -> None:
        writer.save(live, {"step": 1})
        writer.wait()

    return waiting, loading, _growth(copying), _growth(copying)


@pytest.mark.parametrize("zero", [1, 3])
def test_a_rank_holds_at_most_one_parameter_beyond_its_share(tmp_path, zero):
    """And one copy of its share, where it writes from that: half of 3 x 16 MiB on each of two ranks."""
    share = 3 * PARAMETER // 2
    for waiting, loading, first, second in run_ranks(2, _measure, EngineCase(zero, 2), tmp_path):
        assert waiting < SLACK, f"saving took {waiting >> 20} MiB beside the engine"
        assert loading < PARAMETER + SLACK, f"loading took {loading >> 20} MiB beside the engine"
        assert share - SLACK < first < share + SLACK, f"the copy took {first >> 20} MiB"
        assert second < SLACK, f"the second copy took {second >> 20} MiB"
