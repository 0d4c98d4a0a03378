"""How fast `zeropipe prepare --format sft` is, against `prepare` of the same text and `datasets.map`, in one run.

    python benchmarks/records.py [--tokenizer FOLDER] [--megabytes 40] [--turns 2]

The records are conversations made of the standard library's source code. The peer renders and encodes them with
transformers' `apply_chat_template` and its mask, in as many processes as there are cores. The tokenizer: ChatML with
`{% generation %}` markers over a BPE trained on the same text, unless a folder is named. Seconds are whole processes,
imports included, by the clock; the runs are done in turn, so that a busy machine slows all.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson

from zeropipe.data_prep.corpus.sources import builtin_files
from zeropipe.data_prep.tokenizer import train_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|endoftext|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|endoftext|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PEER = """
import sys, datasets
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
data = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
encode = lambda row: dict(tokenizer.apply_chat_template(
    row["messages"], return_dict=True, return_assistant_tokens_mask=True))
data.map(encode, num_proc=int(sys.argv[4]), remove_columns=data.column_names)
"""


def write_inputs(folder: Path, size: int) -> int:
    """The same words as conversations and as text; returns the number of conversations."""
    chance, number, written = random.Random(0), 0, 0
    text = "".join(Path(part.path).read_text("utf-8", "ignore") for part in builtin_files("stdlib"))
    with (folder / "chats.jsonl").open("wb") as chats, (folder / "text.jsonl").open("wb") as plain:
        place = 0
        while written < size:
            messages = []
            for _ in range(chance.choice([1, 1, 2, 3])):
                for role, longest in (("user", 300), ("assistant", 1200)):
                    length = chance.randint(20, longest)
                    messages.append({"role": role, "content": "a " + text[place : place + length]})
                    place = (place + length) % (len(text) - 2000)
            whole = "\n".join(message["content"] for message in messages)
            chats.write(orjson.dumps({"messages": messages}) + b"\n")
            plain.write(orjson.dumps({"text": whole}) + b"\n")
            written, number = written + len(whole), number + 1
    return number


def make_tokenizer(folder: Path) -> Path:
    texts = (Path(part.path).read_text("utf-8", "ignore") for part in list(builtin_files("stdlib"))[:100])
    train_tokenizer(texts, 8000, folder, None)
    (folder / "chat_template.jinja").write_text(CHATML, "utf-8")
    return folder


def seconds_of(command: list[str]) -> float:
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        number = write_inputs(folder, args.megabytes * 10**6)
        tokenizer = args.tokenizer or make_tokenizer(folder / "tokenizer")
        prepare = [sys.executable, "-m", "zeropipe.data_prep.cli", "prepare", "--quiet", "--tokenizer", str(tokenizer)]
        prepare += [
            "--output",
            str(folder / "store"),
            "--overwrite",
            "--workers",
            str(cores),
            "--task-size",
            "4M",
            "--input",
        ]
        chats = str(folder / "chats.jsonl")
        runs = {
            "prepare, text": [*prepare, str(folder / "text.jsonl")],
            "prepare, records": [*prepare, chats, "--format", "sft"],
            "datasets.map": [sys.executable, "-c", PEER, chats, str(tokenizer), str(folder / "cache"), str(cores)],
        }
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.turns):
            for name, command in runs.items():
                shutil.rmtree(folder / "cache", ignore_errors=True)
                found[name].append(seconds_of(command))
    print(f"{number:,} conversations, {args.megabytes} MB, {cores} processes, median of {args.turns}")
    medians = {name: statistics.median(times) for name, times in found.items()}
    for name, seconds in medians.items():
        print(f"{name:18} {seconds:7.1f} s  {args.megabytes / seconds:6.1f} MB/s")
    for name in ("prepare, text", "datasets.map"):
        print(f"records against {name}: {medians[name] / medians['prepare, records']:.2f} x the speed")


if __name__ == "__main__":
    main()
