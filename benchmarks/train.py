"""Pretraining GPT-2 of 30M parameters (6 x 384, context 512, vocabulary 50,257) on two ranks: ours against Trainer.

Hugging Face's, with the same DeepSpeed JSON (ZeRO-1, bf16, micro batch 4 x 2), in turn. Memory is a rank's largest
resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
MODEL = {"model_type": "gpt2", "n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": 512, "vocab_size": 50257}
SEQ, MICRO, ACCUMULATION, WORLD, VOCAB = 512, 4, 2, 2, 50257
BATCH = MICRO * ACCUMULATION * WORLD
PEERS = ("ours", "HF Trainer")
WIDTH = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="timed, after two that are not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return train_with_trainer(arguments.steps)
    print(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_store(work / "store", (arguments.steps + 3) * BATCH)
        (work / "ds.json").write_text(json.dumps(ds_json()))
        found: dict[str, list[tuple[float, float]]] = {peer: [] for peer in PEERS}
        for _ in range(arguments.rounds):
            for peer in PEERS:
                found[peer].append(measure(peer, work, arguments.steps))
    print("".join(f"{title:>{WIDTH}}" for title in ("", "tokens/s, each round", "peak GB a rank")))
    for peer, rounds in found.items():
        speeds = ", ".join(f"{speed:,.0f}" for speed, _ in rounds)
        print(f"{peer:>{WIDTH}}{speeds:>{WIDTH}}{max(peak for _, peak in rounds) / 1e9:>{WIDTH}.2f}")
    speed, memory = (
        statistics.median(r[k] for r in found["ours"]) / statistics.median(r[k] for r in found["HF Trainer"])
        for k in (0, 1)
    )
    print(f"ours over Trainer's: speed {speed:.2f} x, memory {memory:.2f} x")


def make_store(path: Path, samples: int) -> None:
    import numpy as np

    from zeropipe.data_prep.manifest import Manifest
    from zeropipe.data_prep.writer import ShardWriter

    path.mkdir()
    tokens = np.random.default_rng(0).integers(1, VOCAB, samples * SEQ + 1).astype(np.uint16)
    with ShardWriter(path, np.dtype(np.uint16), 1 << 30) as writer:
        writer.append(tokens, np.array([len(tokens)]))
    Manifest("uint16", VOCAB, "<eod>", 0, 1, len(tokens), len(tokens), writer.records).save(path)


def ds_json() -> dict:
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }


def measure(peer: str, work: Path, steps: int) -> tuple[float, float]:
    """Tokens a second after the second step, and the largest resident set of a rank in bytes."""
    from sft import run_watched

    deepspeed = [str(BIN / "deepspeed"), "--num_accelerators", str(WORLD)]
    if peer == "ours":
        recipe = {
            "name": "bench",
            "output": str(work / "run"),
            "model": {"config": MODEL},
            "data": {"train": [{"store": str(work / "store")}], "split": "1", "seq_len": SEQ},
            "batch": {"global": BATCH},
            "duration": {"steps": steps + 2},
            "eval": {"every": 0},
            "log": {"sinks": []},
            "resume": "never",
        }
        (work / "recipe.yaml").write_text(json.dumps(recipe))
        command = [*deepspeed, "--module", "zeropipe.trainer", "--run", str(work / "recipe.yaml")]
        command += ["--deepspeed_config", str(work / "ds.json")]
    else:
        command = [*deepspeed, __file__, "--peer", peer, "--steps", str(steps)]
    report = work / "report.json"
    names = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "REPORT": str(report)}
    peak = run_watched(command, {**os.environ, **names}, work)
    if peer != "ours":
        return json.loads(report.read_text()), peak
    records = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    timed = [record for record in records if record["kind"] == "train"][-steps:]
    return steps * BATCH * SEQ / sum(record["step_seconds"] for record in timed), peak


def train_with_trainer(steps: int) -> None:
    """One rank of Hugging Face's Trainer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter())

    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(1, VOCAB, ((steps + 3) * BATCH, SEQ), generator=draw)
    options = TrainingArguments(
        output_dir="trainer",
        use_cpu=True,
        bf16=True,
        deepspeed=ds_json(),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=1.0,
        max_steps=steps + 2,
        logging_steps=1000,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL))
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, options, train_dataset=data, callbacks=[Clock()])  # type: ignore[arg-type]
    trainer.train()
    if trainer.is_world_process_zero():
        seconds = times[-1] - times[1]
        Path(os.environ["REPORT"]).write_text(json.dumps(steps * BATCH * SEQ / seconds))


if __name__ == "__main__":
    main()
