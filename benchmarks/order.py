"""What it costs to open a store, to draw from it, and to read a batch, against a plain copy of the same bytes.

    python benchmarks/order.py [--documents 100000 10000000 1000000000] [--folder DIR]

Stores of any size are sparse files of 1,000 tokens a document: next to no disk, but every look-up and every page is
real. Each size is measured in a process of its own: its time and memory from before the store is opened to the first
batch in hand. Reading is measured on a store of 1 GB of tokens that is really there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from zeropipe.data_prep.making.encoding import resident_memory
from zeropipe.data_prep.store import TokenStore
from zeropipe.trainer.data.order import SampleOrder, Source

BATCH, SEQ_LEN, DOCUMENT = 64, 1024, 1000


def sparse_store(prefix: Path, documents: int) -> None:
    """A Megatron pair of `documents` documents of 1,000 tokens. The look-ups that opening needs find true values."""
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
        file.seek(34 + 4 * (documents - 1))
        file.write(struct.pack("<i", DOCUMENT))
        file.seek(34 + 12 * documents - 8)
        file.write(struct.pack("<q", (documents - 1) * DOCUMENT * 2))
        file.seek(34 + 20 * documents)
        file.write(struct.pack("<q", documents))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(documents * DOCUMENT * 2)


def draw(store: TokenStore, first: int) -> list[int]:
    """Which windows the run's samples [first, first + 64) are."""
    order = SampleOrder([Source(store.fingerprint, (store.num_tokens - 1) // SEQ_LEN)], seed=1)
    return order.sample(np.arange(first, first + BATCH))[1].tolist()


def read(store: TokenStore, windows: Iterable[int]) -> list[np.ndarray]:
    return [store.read(window * SEQ_LEN, (window + 1) * SEQ_LEN + 1) for window in windows]


def open_and_draw(prefix: Path) -> None:
    """Prints seconds to open, seconds to the first batch, and bytes of memory that both took."""
    memory, start = resident_memory(), time.perf_counter()
    store = TokenStore.open(prefix)
    opened = time.perf_counter()
    read(store, draw(store, 0))
    print(opened - start, time.perf_counter() - start, resident_memory() - memory)


def measure_opening(folder: Path, sizes: list[int]) -> None:
    print("documents      tokens    index     open     first batch   memory")
    for documents in sizes:
        prefix = folder / f"sparse{documents}"
        sparse_store(prefix, documents)
        command = [sys.executable, __file__, "--open", str(prefix)]
        opened, drawn, memory = map(float, subprocess.check_output(command, text=True).split())
        index = os.path.getsize(f"{prefix}.idx")
        print(
            f"{documents:9.0e} {documents * DOCUMENT:11.0e} {index / 1e9:6.2f} GB {opened * 1e3:6.1f} ms "
            f"{drawn * 1e3:9.1f} ms {memory / 1e6:9.1f} MB"
        )
        for suffix in (".idx", ".bin"):
            prefix.with_name(prefix.name + suffix).unlink()


def real_store(prefix: Path, tokens: int) -> None:
    sparse_store(prefix, tokens // DOCUMENT)
    random = np.random.default_rng(0)
    with open(f"{prefix}.bin", "r+b") as file:
        for _ in range(tokens // 10_000_000):
            file.write(random.integers(0, 50_000, 10_000_000, dtype=np.uint16).tobytes())
        file.flush()
        os.fsync(file.fileno())


def drop_from_page_cache(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def timed(action: Callable[[int], object], turns: int, before: Callable[[], object] = lambda: None) -> float:
    """Median seconds of an action."""
    times = []
    for turn in range(turns):
        before()
        start = time.perf_counter()
        action(turn)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_reading(folder: Path) -> None:
    """A batch from a cold and a warm page cache, and the same bytes copied from an array in memory."""
    prefix, tokens = folder / "real", 500_000_000
    real_store(prefix, tokens)
    binary = f"{prefix}.bin"

    store = TokenStore.open(prefix)
    drawing = timed(lambda turn: draw(store, turn * BATCH), 200)
    windows = [draw(store, turn * BATCH) for turn in range(200)]
    cold = timed(lambda turn: read(TokenStore.open(prefix), windows[turn]), 15, lambda: drop_from_page_cache(binary))
    array = np.frombuffer(Path(binary).read_bytes(), np.uint16)
    read(store, range(0, tokens // SEQ_LEN - 1))  # maps every page
    warm = timed(lambda turn: read(store, windows[turn]), 200)
    plain = timed(
        lambda turn: [array[w * SEQ_LEN : (w + 1) * SEQ_LEN + 1].astype(np.int64) for w in windows[turn]], 200
    )
    size = BATCH * (SEQ_LEN + 1) * 2
    print(f"\n{BATCH} samples of {SEQ_LEN} tokens, {size / 1e3:.0f} kB of uint16 to int64:")
    rows = {"drawn (which windows)": drawing, "read, cold page cache": cold, "read, warm": warm, "plain copy": plain}
    for what, seconds in rows.items():
        print(f"  {what:24} {seconds * 1e3:8.2f} ms  {BATCH * SEQ_LEN / seconds / 1e6:8.1f} M tokens/s")
    print(f"  a warm read takes {warm / plain:.1f} times the plain copy from memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[10**5, 10**7, 10**9])
    parser.add_argument("--folder", type=Path, help="where to work (a temporary folder)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        open_and_draw(args.open)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        measure_opening(Path(name), args.documents)
        measure_reading(Path(name))


if __name__ == "__main__":
    main()
