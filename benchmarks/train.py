"""Pretraining GPT-2 (context 512, vocabulary 50,257) in bf16, in turn: ours and others on the same tokens and ranks.

HF Trainer and DeepSpeed's engine with the model's own loss get our DeepSpeed JSON (ZeRO-1). Plain PyTorch is
DistributedDataParallel with autocast; litgpt is its GPT, without dropout, in that loop. Memory is a rank's largest
resident set. Utilisation is 6 N + 6 L T d operations a token (the causal half of attention; N without position
embeddings) against the best matrix product of all ranks at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
SEQ, MICRO, VOCAB, UNTIMED = 512, 4, 50257, 2
SIZES = {  # the model, micro batches a rank, timed steps
    "30M": ({"n_layer": 6, "n_embd": 384, "n_head": 6}, 2, 4),
    "124M": ({"n_layer": 12, "n_embd": 768, "n_head": 12}, 1, 3),
}
PEERS = ("ours", "HF Trainer", "DeepSpeed engine", "plain PyTorch", "litgpt")
COMPILED = "ours, compiled"
WIDTH = 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--peers", nargs="+", choices=(*PEERS, COMPILED), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--litgpt", metavar="PYTHON", help="a Python that has litgpt, if this one has not")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        from train_peers import run

        return run(json.loads(Path(arguments.job).read_text()), Path(arguments.job).parent)
    print(__doc__)
    for size in arguments.sizes:
        compare(size, arguments)


def compare(size: str, arguments: argparse.Namespace) -> None:
    shape, accumulation, steps = SIZES[size]
    job = {
        "model": {"model_type": "gpt2", "n_positions": SEQ, "vocab_size": VOCAB, **shape},
        "seq": SEQ,
        "micro": MICRO,
        "accumulation": accumulation,
        "steps": steps + UNTIMED,
        "untimed": UNTIMED,
        "ds": ds_json(accumulation),
    }
    peers = [peer for peer in arguments.peers if peer != "litgpt" or python_of(peer, arguments) is not None]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_store(work / "store", (steps + UNTIMED + 1) * tokens_of(job, arguments.ranks))
        found: dict[str, list[tuple[float, float]]] = {peer: [] for peer in peers}
        for _ in range(arguments.rounds):
            for peer in peers:
                found[peer].append(measure(peer, job, work, arguments))
        print(f"\nGPT-2 {size}, {arguments.ranks} ranks, micro batch {MICRO} x {accumulation}")
        show(found)
        looks = [(arguments.ranks, 1)]
        if "DS_ACCELERATOR" in environment_of(work, 1):  # a CPU: one process with all cores as well
            looks.append((1, os.cpu_count() or 1))
        for ranks, threads in looks:
            show_inside(look_inside(job, work, ranks, threads), job, ranks)


def python_of(peer: str, arguments: argparse.Namespace) -> str | None:
    if peer != "litgpt" or importlib.util.find_spec("litgpt") is not None:
        return sys.executable
    return arguments.litgpt


def environment_of(work: Path, threads: int) -> dict[str, str]:
    import torch

    cpu = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    return {**os.environ, "REPORT": str(work / "report.json"), **cpu}


def tokens_of(job: dict[str, Any], ranks: int) -> int:
    """Tokens of a step."""
    return job["micro"] * job["accumulation"] * job["seq"] * ranks


def ds_json(accumulation: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }


def make_store(path: Path, tokens: int) -> None:
    """A store of random tokens."""
    import numpy as np

    from zeropipe.data_prep.manifest import Manifest
    from zeropipe.data_prep.writer import ShardWriter

    path.mkdir()
    drawn = np.random.default_rng(0).integers(1, VOCAB, tokens + 1).astype(np.uint16)
    with ShardWriter(path, np.dtype(np.uint16), 1 << 30) as writer:
        writer.append(drawn, np.array([len(drawn)]))
    Manifest("uint16", VOCAB, "<eod>", 0, 1, len(drawn), len(drawn), writer.records).save(path)


def write_run(job: dict[str, Any], work: Path, ranks: int, compiled: bool = False) -> tuple[str, str]:
    """Recipe and JSON of our run."""
    recipe = {
        "name": "bench",
        "output": str(work / "run"),
        "model": {"config": {key: value for key, value in job["model"].items() if key != "vocab_size"}},
        "data": {"train": [{"store": str(work / "store")}], "split": "1", "seq_len": SEQ},
        "compile": "blocks" if compiled else "none",
        "batch": {"global": job["micro"] * job["accumulation"] * ranks},
        "duration": {"steps": job["steps"]},
        "eval": {"every": 0},
        "log": {"sinks": []},
        "resume": "never",
    }
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    (work / "ds.json").write_text(json.dumps(job["ds"]))
    return str(work / "recipe.yaml"), str(work / "ds.json")


def measure(peer: str, job: dict[str, Any], work: Path, arguments: argparse.Namespace) -> tuple[float, float]:
    """Tokens a second of the timed steps, and the largest resident set of a rank in bytes."""
    from sft import run_watched

    ranks = arguments.ranks
    command = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks)]
    if peer.startswith("ours"):
        recipe, config = write_run(job, work, ranks, peer != "ours")
        command += ["--module", "zeropipe.trainer", "--run", recipe, "--deepspeed_config", config]
    else:
        command = own_launch(peer, {**job, "peer": peer}, work, command, arguments)
    peak = run_watched(command, environment_of(work, 1), work)
    timed = job["steps"] - UNTIMED
    if peer.startswith("ours"):
        records = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
        seconds = sum([record["step_seconds"] for record in records if record["kind"] == "train"][-timed:])
    else:
        ended = json.loads((work / "report.json").read_text())
        seconds = ended[-1] - ended[UNTIMED - 1]
    return timed * tokens_of(job, ranks) / seconds, peak


def own_launch(
    peer: str, job: dict[str, Any], work: Path, deepspeed: list[str], arguments: argparse.Namespace
) -> list[str]:
    """The command that starts the ranks of a peer, or of a look inside ours."""
    (work / "report.json").unlink(missing_ok=True)
    (work / "job.json").write_text(json.dumps(job))
    script = [__file__, "--job", str(work / "job.json")]
    python = python_of(peer, arguments)
    if python in (sys.executable, None):
        return [*deepspeed, *script]
    torchrun = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    return [*torchrun, *script]


def look_inside(job: dict[str, Any], work: Path, ranks: int, threads: int) -> dict[str, Any]:
    from sft import run_watched

    recipe, config = write_run(job, work, ranks)
    launch = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks)]
    (work / "job.json").write_text(json.dumps({**job, "peer": "inside", "recipe": recipe, "json": config}))
    run_watched([*launch, __file__, "--job", str(work / "job.json")], environment_of(work, threads), work)
    return json.loads((work / "report.json").read_text())


def show(found: dict[str, list[tuple[float, float]]]) -> None:
    titles = ("", "tokens/s, each round", "peak GB a rank", "ours: speed", "memory")
    print("".join(f"{title:>{WIDTH}}" for title in titles))
    medians = {peer: [statistics.median(r[k] for r in rounds) for k in (0, 1)] for peer, rounds in found.items()}
    for peer, rounds in found.items():
        speeds = ", ".join(f"{speed:,.0f}" for speed, _ in rounds)
        line = f"{peer:>{WIDTH}}{speeds:>{WIDTH}}{max(peak for _, peak in rounds) / 1e9:>{WIDTH}.2f}"
        if "ours" in medians:
            ratios = (ours / theirs for ours, theirs in zip(medians["ours"], medians[peer], strict=True))
            line += "".join(f"{ratio:>{WIDTH - 2}.2f} x" for ratio in ratios)
        print(line)


def show_inside(found: dict[str, Any], job: dict[str, Any], ranks: int) -> None:
    split, total = found["split"], found["split"]["total"]
    kinds = {key: split.get(key, 0.0) for key in ("forward", "backward", "step", "communication", "data", "log")}
    kinds["the rest of the loop"] = total - sum(kinds.values())
    parts = ", ".join(f"{key} {100 * seconds / total:.1f} %" for key, seconds in kinds.items())
    rate = found["flops"] * tokens_of(job, ranks) / total
    print(f"ours, {ranks} rank{'s' * (ranks > 1)} of {found['threads']} thread(s), a step of {total:.2f} s: {parts}")
    peak = found["peak"]
    line = f"    {rate / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s: {100 * rate / peak:.0f} % utilisation"
    print(line + (f"; all-reduce {found['bandwidth'] / 1e9:.2f} GB/s a rank" if ranks > 1 else ""))


if __name__ == "__main__":
    main()
