"""The shipped recipes sft, lora, qlora (one epoch) and dpo (half of one) on SmolLM2-135M-Instruct, two ranks.

Held-out loss (of dpo, the share of pairs in which the chosen text wins) before and after, minutes, a rank's largest
resident set, and an answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT / "benchmarks"))
JSONS = {"sft": "zero1", "lora": "zero1", "qlora": "zero1_autocast", "dpo": "zero1"}
EPOCHS = {"sft": 1, "lora": 1, "qlora": 1, "dpo": 0.5}
PROMPT = "What is AI?"
WIDTH = 14


def main() -> None:
    from sft import run_watched

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--material", type=Path, help="as scripts/material.py makes it; default: made now")
    parser.add_argument("--recipes", nargs="+", default=list(JSONS))
    arguments = parser.parse_args()
    print(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        material = work / "material"
        if arguments.material is not None:
            material.symlink_to(arguments.material.absolute())
        else:
            subprocess.run(
                [sys.executable, ROOT / "scripts" / "material.py", material], check=True, capture_output=True
            )
        for kind, source in (("sft", "dialogues"), ("dpo", "preferences")):
            for split in ("train", "valid"):
                command = ["prepare", "--format", kind, "--input", f"material/{source}/{split}.jsonl", "--quiet"]
                zeropipe(work, *command, "--tokenizer", "material/smollm2", "--output", f"data/{kind}-{split}")
        titles = ("recipe", "trained", "before", "after", "minutes", "GB a rank")
        print("".join(f"{title:>{WIDTH}}" for title in titles))
        answers = [("before", zeropipe(work, "generate", "material/smollm2", "--chat", "--prompt", PROMPT))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        for recipe in arguments.recipes:
            launch = ["launch", recipe, "--deepspeed_config", JSONS[recipe], "--devices", "2"]
            launch.append(f"duration.epochs={EPOCHS[recipe]}")
            peak = run_watched([str(BIN / "zeropipe"), *launch], environment, work)
            show(recipe, work, peak)
            answers.append((recipe, zeropipe(work, "generate", f"runs/{recipe}", "--chat", "--prompt", PROMPT)))
        print(f"\n{PROMPT}, greedily:")
        for name, said in answers:
            print(f"  {name:<8} {said.removeprefix(PROMPT).strip()}")


def show(recipe: str, work: Path, peak: float) -> None:
    run = work / "runs" / recipe
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = records[-1]["time"] - records[0]["time"]
    after = next(record for record in reversed(records) if record["kind"] == "eval")
    if recipe == "dpo":
        reference = ["--reference", "material/smollm2"]
        before = evaluated(work, "material/smollm2", "data/dpo-valid", *reference)["rewards/accuracies"]
        values = [f"{before:.1%}", f"{after['rewards/accuracies']:.1%}"]
    else:
        before = evaluated(work, "material/smollm2", "data/sft-valid")["loss"]
        values = [f"{before:.4f}", f"{after['loss']:.4f}"]
    trained = zeropipe(work, "plan", recipe, "--deepspeed_config", JSONS[recipe], "--devices", "2").split("llama, ")[1]
    cells = [recipe, trained.split(" ")[0], *values, f"{seconds / 60:.1f}", f"{peak / 1e9:.2f}"]
    print("".join(f"{cell:>{WIDTH}}" for cell in cells), flush=True)


def evaluated(work: Path, model: str, store: str, *options: str) -> dict:
    words = ["eval", model, "--store", store, "--seq-len", "512", "--json", *options]
    return json.loads(zeropipe(work, *words))


def zeropipe(work: Path, *words: str) -> str:
    done = subprocess.run([BIN / "zeropipe", *words], cwd=work, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"zeropipe {' '.join(words)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
