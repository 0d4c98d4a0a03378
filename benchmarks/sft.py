"""Fine-tuning SmolLM2-135M on dialogues: two ranks, bf16, one DeepSpeed JSON; ours against TRL's SFTTrainer, in turn.

The same records: packed by ours, which keeps them apart, padded by TRL. TRL's own packing keeps records apart only with
a flash attention that CPUs lack; it is shown as well, though there records see each other. Both get global batches of
about as many records. Tokens are those of the records, padding not counted; memory is a rank's largest resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
WIDTH = 22
RECORDS = 64  # of a global batch of TRL's; ours has as many rows of 512 as hold about that many
PEERS = ("ours", "TRL, padded", "TRL, packed, leaking")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--material", type=Path, help="as scripts/material.py makes it; default: made now")
    parser.add_argument("--steps", type=int, default=4, help="timed, after one that is not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lora", action="store_true", help="LoRA on all linears instead of all weights")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return train_with_trl(arguments)
    print(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        material = (arguments.material or work / "material").absolute()
        if arguments.material is None:
            subprocess.run(
                [sys.executable, ROOT / "scripts" / "material.py", material], check=True, capture_output=True
            )
        prepare(material, work)
        found: dict[str, list[tuple[float, float]]] = {peer: [] for peer in PEERS}
        for _ in range(arguments.rounds):
            for peer in PEERS:
                found[peer].append(measure(peer, material, work, arguments))
        show(found)


def prepare(material: Path, work: Path) -> None:
    command = ["prepare", "--format", "sft", "--input", material / "dialogues" / "train.jsonl", "--quiet"]
    command += ["--tokenizer", material / "smollm2", "--output", work / "store"]
    subprocess.run([BIN / "zeropipe", *command], check=True, capture_output=True)
    (work / "ds.json").write_text(json.dumps(ds_json(4)))


def ds_json(micro: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000},
    }


def measure(peer: str, material: Path, work: Path, arguments: argparse.Namespace) -> tuple[float, float]:
    """Record tokens a second after the first step, and the largest resident set of a rank in bytes."""
    report = work / "report.json"
    report.unlink(missing_ok=True)
    deepspeed = [BIN / "deepspeed", "--num_accelerators", "2"]
    if peer == "ours":
        recipe = {
            "name": "bench",
            "output": str(work / "run"),
            "model": {"init": str(material / "smollm2")},
            "data": {"train": [{"store": str(work / "store")}], "split": "1", "seq_len": 512},
            "objective": "sft",
            "adapter": {"type": "lora", "r": 16, "alpha": 32} if arguments.lora else "none",
            "batch": {"global": 8},
            "duration": {"steps": arguments.steps + 1},
            "optimizer": {"lr": 1e-4},
            "eval": {"every": 0},
            "log": {"sinks": []},
            "resume": "never",
        }
        (work / "recipe.yaml").write_text(json.dumps(recipe))
        command = [*deepspeed, "--module", "zeropipe.trainer", "--run", work / "recipe.yaml"]
        command += ["--deepspeed_config", work / "ds.json"]
    else:
        command = [*deepspeed, __file__, "--peer", peer, "--material", material, "--steps", str(arguments.steps)]
        command += ["--lora"] if arguments.lora else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "REPORT": str(report)}
    peak = run_watched([str(part) for part in command], environment, work)
    if peer != "ours":
        return json.loads(report.read_text()), peak
    records = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    timed = [record for record in records if record["kind"] == "train"][-arguments.steps :]
    return rows_tokens(work, arguments.steps) / sum(record["step_seconds"] for record in timed), peak


def rows_tokens(work: Path, steps: int) -> int:
    """Tokens of the records in the rows of steps 2 to `steps` + 1 of our run."""
    import numpy as np

    from zeropipe.trainer.data.samples import Packs, open_samples, sample_order
    from zeropipe.trainer.recipe.recipe import load_recipe

    recipe = load_recipe(str(work / "recipe.yaml"))
    (packs,) = samples = open_samples(recipe, "train")
    assert isinstance(packs, Packs)
    rows = sample_order(recipe, samples).sample(np.arange(8, 8 * (steps + 1)))[1]
    return sum(int(packs.lengths[packs.rows[int(row)]].sum()) + len(packs.rows[int(row)]) for row in rows)


def run_watched(command: list[str], environment: dict[str, str], work: Path) -> float:
    """Runs a launch; the largest resident set that any of its processes had."""
    process = subprocess.Popen(
        command, env=environment, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            try:
                children = psutil.Process(process.pid).children(recursive=True)
                peak[0] = max([peak[0], *(child.memory_info().rss for child in children)])
            except psutil.NoSuchProcess:
                pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate()[0]
    done.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{output}")
    return peak[0]


def train_with_trl(arguments: argparse.Namespace) -> None:
    """One rank of TRL's trainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    lines = (arguments.material / "dialogues" / "train.jsonl").read_text().splitlines()
    packed, times = "packed" in arguments.peer, []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append((time.perf_counter(), state.num_input_tokens_seen))

    micro, accumulation = (4, 1) if packed else (8, RECORDS // 16)
    config = SFTConfig(
        output_dir="trl",
        use_cpu=True,
        bf16=True,
        deepspeed={**ds_json(micro), "gradient_accumulation_steps": accumulation},
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=False,
        max_length=512,
        packing=packed,
        max_steps=arguments.steps + 1,
        learning_rate=1e-4,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        include_num_input_tokens_seen="non_padding",
        model_init_kwargs={"dtype": "bfloat16"},
    )
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if arguments.lora else None
    dataset = Dataset.from_list([{"messages": json.loads(line)["messages"]} for line in lines])
    trainer = SFTTrainer(
        str(arguments.material / "smollm2"), config, train_dataset=dataset, callbacks=[Clock()], peft_config=adapter
    )
    trainer.train()
    if trainer.is_world_process_zero():
        (start, before), (stop, after) = times[0], times[-1]
        Path(os.environ["REPORT"]).write_text(json.dumps((after - before) / (stop - start)))


def show(found: dict[str, list[tuple[float, float]]]) -> None:
    print("".join(f"{title:>{WIDTH}}" for title in ("", "tokens/s, each round", "peak GB a rank", "speed", "memory")))
    middle = {
        peer: [statistics.median(column) for column in zip(*rounds, strict=True)] for peer, rounds in found.items()
    }
    for peer, rounds in found.items():
        speeds = ", ".join(f"{speed:,.0f}" for speed, _ in rounds)
        ratios = [middle["ours"][k] / middle[peer][k] for k in (0, 1)]
        cells = [peer, speeds, f"{middle[peer][1] / 1e9:.2f}", *(f"{ratio:.2f} x" for ratio in ratios)]
        print("".join(f"{cell:>{WIDTH}}" for cell in cells))
    print("speed and memory: ours over the peer's")


if __name__ == "__main__":
    main()
