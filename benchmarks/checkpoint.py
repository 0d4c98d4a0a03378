"""Saving a GPT-2 of 30M parameters on two ranks: ours against DeepSpeed's own `save_checkpoint`, in turn, in one run.

Ours hashes every byte and forces it to the disk, DeepSpeed's does neither. Most of the disk's work goes on beside the
writing; the wait for it that is left at the end is shown apart. Loading, with the digests verified, is shown beside it.
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
BOUND = 1.5  # times DeepSpeed's save, with all that ours does beyond it
WIDTH = 20  # of a column


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    print(__doc__)
    titles = ("stage", "DeepSpeed", "ours", "of it fsync", "ratio without fsync", "with fsync", "load")
    print("".join(f"{title:>{WIDTH}}" for title in titles))
    for stage in arguments.stages:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            _spawn(arguments.ranks, stage, arguments.rounds, Path(folder))


def _spawn(world: int, stage: int, rounds: int, folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(r, world, port, stage, rounds, folder)) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a rank failed")


def _rank(rank: int, world: int, port: int, stage: int, rounds: int, folder: Path) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in names.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    import logging

    from zeropipe.trainer.checkpoint.deepspeed_state import Live
    from zeropipe.trainer.checkpoint.loader import load
    from zeropipe.trainer.checkpoint.writer import save
    from zeropipe.trainer.ranks.ranks import init_distributed, shut_down

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    ranks = init_distributed()
    engine = _engine(stage, ranks)
    live = Live(engine, sorted((p.spec.name, p) for p in engine.module.parameters()), ranks)
    synced = _count_fsync()
    theirs, ours, forced, loads = [], [], [], []
    for _ in range(rounds + 1):  # the first warms up
        theirs.append(_timed(ranks, lambda: engine.save_checkpoint(str(folder / "theirs"), tag="t")))
        _clear(ranks, folder / "theirs")
        before = sum(synced)
        ours.append(_timed(ranks, lambda: save(live, folder, {"step": 1})))
        forced.append(max(ranks.gather_objects(sum(synced) - before)))
        path = folder / "checkpoints" / "step-00000001"
        loads.append(_timed(ranks, lambda path=path: load(live, path)))
        _clear(ranks, folder / "checkpoints")
    if ranks.is_main:
        native, own, fsync, loading = (statistics.median(values[1:]) for values in (theirs, ours, forced, loads))
        seconds = [f"{value:{WIDTH - 2}.2f} s" for value in (native, own, fsync, loading)]
        ratios = [f"{ratio:{WIDTH}.2f}" for ratio in ((own - fsync) / native, own / native)]
        verdict = "" if own <= BOUND * native else f"  above {BOUND}"
        print(f"{stage:>{WIDTH}}", *seconds[:3], *ratios, seconds[3], verdict, sep="", flush=True)
    ranks.barrier()
    shut_down()


def _engine(stage: int, ranks):
    import deepspeed
    import torch

    from zeropipe.trainer.modeling.build import build_model

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    model = build_model(GPT2_30M, None, 0, torch.float32, ranks, config if stage == 3 else None)
    parameters = list(model.parameters())
    engine = deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]
    ids = torch.randint(0, 50304, (1, 32))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()  # the moments exist from here on
    return engine


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


def _timed(ranks, action: Callable[[], object]) -> float:
    ranks.barrier()
    started = time.perf_counter()
    action()
    ranks.barrier()
    return time.perf_counter() - started


def _clear(ranks, folder: Path) -> None:
    """The disk's queue is empty before the next measurement."""
    ranks.barrier()
    if ranks.is_main:
        shutil.rmtree(folder)
        os.sync()
    ranks.barrier()


if __name__ == "__main__":
    main()
