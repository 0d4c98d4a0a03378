"""Saving a GPT-2 of 30M parameters on two ranks: ours against DeepSpeed's own `save_checkpoint`, in turn, in one run.

Ours hashes every byte and forces it to the disk, DeepSpeed's does neither. Training waits for the copy alone: that
stall is set against one `copy_` of as many bytes into memory that has been used before, as the copy's is from the
second save on. `total` is until the checkpoint has its name, nothing else being done meanwhile; of it, `fsync` is what
is waited for after the last byte was written. Loading verifies every byte first, DeepSpeed's does not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
GPT2_30M = {
    "model_type": "gpt2",
    "vocab_size": 50304,
    "n_layer": 6,
    "n_embd": 384,
    "n_head": 6,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BOUNDS = {"stall / copy": 1.2, "total / DeepSpeed": 1.5, "load / DeepSpeed": 1.0}
WIDTH = 20  # of a column


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--layers", type=int, default=6, help="of the model (default: 6, 30M parameters)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    print(__doc__)
    for stage in arguments.stages:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            _spawn(arguments.ranks, stage, arguments.rounds, Path(folder), {**GPT2_30M, "n_layer": arguments.layers})


def _spawn(world: int, *arguments: object) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(r, world, port, *arguments)) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a rank failed")


def _rank(rank: int, world: int, port: int, stage: int, rounds: int, folder: Path, model: dict) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in names.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    import logging

    import torch

    from zeropipe.trainer.checkpoint.deepspeed_state import Live
    from zeropipe.trainer.checkpoint.loader import load
    from zeropipe.trainer.checkpoint.snapshot import Snapshot, shares
    from zeropipe.trainer.checkpoint.writer import SnapshotWriter
    from zeropipe.trainer.ranks.ranks import init_distributed, shut_down

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    ranks = init_distributed()
    engine = _engine(stage, ranks, model)
    live = Live(engine, sorted((p.spec.name, p) for p in engine.module.parameters()), ranks)
    measured = Snapshot()
    measured.take(shares(live))
    source, target = (torch.ones(measured.nbytes, dtype=torch.uint8) for _ in range(2))
    del measured
    writer = SnapshotWriter(folder, None, None, total_steps=0)
    synced = _count_fsync()
    taken: dict[str, list[float]] = {}

    def timed(what: str, action: Callable[[], object]) -> float:
        """Until the slowest rank is done, as each rank's own clock tells."""
        ranks.barrier()
        started = time.perf_counter()
        action()
        seconds = time.perf_counter() - started
        taken.setdefault(what, []).append(max(ranks.gather_objects(seconds)))
        return taken[what][-1]

    theirs, path = folder / "theirs", folder / "checkpoints" / "step-00000001"
    for _ in range(rounds + 1):  # the first warms up
        timed("DeepSpeed", lambda: engine.save_checkpoint(str(theirs), tag="t"))
        timed("DeepSpeed load", lambda: engine.load_checkpoint(str(theirs), tag="t"))
        _clear(ranks, theirs)
        _step(engine)  # as in training, the state has just been used
        timed("copy", lambda: target.copy_(source))
        before = sum(synced)
        started = time.perf_counter()
        timed("stall", lambda: writer.save(live, {"step": 1}))
        timed("writing", writer.wait)
        taken.setdefault("total", []).append(time.perf_counter() - started)
        taken.setdefault("fsync", []).append(max(ranks.gather_objects(sum(synced) - before)))
        timed("load", lambda: load(live, path))
        _clear(ranks, path.parent)
    if ranks.is_main:
        _report(stage, source.numel() * world, {what: values[1:] for what, values in taken.items()})
    ranks.barrier()
    shut_down()


def _report(stage: int, nbytes: int, taken: dict[str, list[float]]) -> None:
    middle = {what: statistics.median(values) for what, values in taken.items()}
    ratios = {
        "stall / copy": middle["stall"] / middle["copy"],
        "total / DeepSpeed": middle["total"] / middle["DeepSpeed"],
        "load / DeepSpeed": middle["load"] / middle["DeepSpeed load"],
    }
    print(f"ZeRO-{stage}, {nbytes / 1e6:.0f} MB", flush=True)
    for what in ("copy", "stall", "total", "fsync", "DeepSpeed", "load", "DeepSpeed load"):
        spread = f"{min(taken[what]):.3f} to {max(taken[what]):.3f}"
        print(f"{what:>{WIDTH}}{middle[what]:9.3f} s  ({spread}) {middle[what] / nbytes * 1e9:8.3f} s/GB", flush=True)
    for what, ratio in ratios.items():
        print(f"{what:>{WIDTH}}{ratio:9.2f}{f'  above {BOUNDS[what]}' if ratio > BOUNDS[what] else ''}", flush=True)


def _engine(stage: int, ranks, model: dict):
    import deepspeed
    import torch

    from zeropipe.trainer.modeling.build import build_model

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    built = build_model(model, None, 0, torch.float32, ranks, config if stage == 3 else None)
    engine = deepspeed.initialize(model=built, model_parameters=list(built.parameters()), config=config)[0]
    _step(engine)  # the moments exist from here on
    return engine


def _step(engine) -> None:
    import torch

    ids = torch.randint(0, 50304, (1, 32))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def _count_fsync() -> list[float]:
    """Seconds spent in each fsync from now on."""
    seconds: list[float] = []
    forced = os.fsync

    def counted(descriptor: int) -> None:
        started = time.perf_counter()
        forced(descriptor)
        seconds.append(time.perf_counter() - started)

    os.fsync = counted
    return seconds


def _clear(ranks, folder: Path) -> None:
    """The disk's queue is empty before the next measurement."""
    ranks.barrier()
    if ranks.is_main:
        shutil.rmtree(folder)
        os.sync()
    ranks.barrier()


if __name__ == "__main__":
    main()
