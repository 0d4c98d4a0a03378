"""Records of a run, written by hand, in which everything happens that the page shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zeropipe.trainer.plan.work import model_flops

MODEL = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64, "vocab_size": 512}


def write_whole_run(folder: Path, steps: int, rate: float = 3e-4, spike: int = 37) -> Path:
    """Resumed in the middle from the step before; evaluated, asked and saved every tenth step."""
    folder.mkdir(parents=True)
    host = {"host": "node1", "rank": 0, "device_name": "NVIDIA H100 80GB HBM3"}
    planned = {
        "positions": steps * 256,
        "memory": 2**30,
        "token_flops": model_flops(MODEL, 32),
        "computes_in": "bfloat16",
    }
    start = {"total_steps": steps, "layout": {"world": 2, "zero_stage": 2}, "hosts": [host, host], "planned": planned}
    records: list[dict[str, Any]] = [{"kind": "event", "event": "start", "step": 0, "run": "a", **start}]
    for step in range(1, steps + 1):
        if step == steps // 2:
            back = {"kind": "event", "event": "resume", "step": step - 2, "run": "b", "path": "old", **start}
            records += [back, step_record(step - 1, rate, spike, "b")]
        run = "b" if step >= steps // 2 else "a"
        records.append(step_record(step, rate, spike, run))
        if step % 10 == 0:
            drawn = {"data/web": step * 6, "data/code": step * 2}
            records += [
                {"kind": "eval", "step": step, "split": "valid", "loss": 3.0, "perplexity": 20.0, "run": run},
                {
                    "kind": "event",
                    "event": "answer",
                    "step": step,
                    "run": run,
                    "prompt": "Q?",
                    "answer": "</script><b>A",
                },
                {"kind": "event", "event": "save", "step": step, "run": run, "path": f"step-{step}", "drawn": drawn},
            ]
    records.append({"kind": "event", "event": "skip", "step": steps, "run": "b", "samples": [8, 16]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "recipe.yaml").write_text(f"name: x\nseed: 1\noptimizer: {{lr: {rate}}}\n")
    (folder / "deepspeed.json").write_text('{"zero_optimization": {"stage": 2}}')
    facts = {"command": "zeropipe", "versions": {"torch": "2.13.0"}, "hosts": [host, host]}
    (folder / "environment.json").write_text(json.dumps(facts))
    return folder


def step_record(step: int, rate: float, spike: int, run: str) -> dict[str, Any]:
    seen = {"hosts": {"node1": {"host_memory": 3 * 2**30}}, "most_memory": 2**30 + step, "most_data_seconds": 0.1}
    return {
        "kind": "train", "step": step, "run": run, "time": 1e9 + step,
        "loss": 99.0 if step == spike else 5.0 + 3 / step,
        "lr": rate, "grad_norm": 1.0, "tokens": step * 250, "tokens_per_second": 500.0, "step_seconds": 0.5,
        "data_seconds": 0.05, "samples": [step * 8 - 8, step * 8], "ledger": "0",
        **(seen if step % 5 == 0 else {}),
    }  # fmt: skip
