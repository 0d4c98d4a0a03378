"""How fast `zeropipe prepare` is, against the limit and against what people use today, all measured in one run.

    python benchmarks/prepare.py [--tokenizer gpt2/] [--sizes 200M 1G 4G] [--turns 3] [--datatrove PYTHON]

The limit is gigatoken's own `encode_files` on the same bytes: it reads and encodes, and writes nothing. The peers are
`datasets.map` with the fast tokenizer, and datatrove's tokenization (in a Python of its own, named by --datatrove).
Every figure is a whole process, from its start to its end, imports included; "inside" is the call to `encode_files`
alone. Limit and project are run in turn, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import orjson
import psutil
from text_corpus import write_jsonl

from zeropipe.data_prep.cli import byte_count

RAW = """
import sys, time, gigatoken
tokenizer = gigatoken.Tokenizer(sys.argv[2])
start = time.perf_counter()
tokenizer.encode_files(gigatoken.JsonlFileSource([sys.argv[1]]))
print(time.perf_counter() - start)
"""
DATASETS = """
import sys, datasets
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
data = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
encode = lambda batch: {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}
data.map(encode, batched=True, num_proc=int(sys.argv[4]), remove_columns=data.column_names)
"""
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
folder, tokenizer, output, workers = sys.argv[1:5]
steps = [JsonlReader(folder), DocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>")]
LocalPipelineExecutor(steps, tasks=int(workers), workers=int(workers), logging_dir=output + "/logs").run()
"""


@dataclass
class Run:
    seconds: float  # wall clock, whole process
    cpu: float  # seconds of all its processes
    peak: int  # bytes resident, all its processes together, sampled
    output: str


def run(command: list[str], **environment: str) -> Run:
    """Runs a command, watching the memory and the processor time of its whole family."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=log, env={**os.environ, **environment})
        leader, peak, cpu = psutil.Process(process.pid), 0, {}
        while process.poll() is None:
            peak = max(peak, _sample(leader, cpu))
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        for file in (log, output):
            file.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command[:6])} … failed:\n{log.read()[-3000:]}")
        return Run(seconds, sum(cpu.values()), peak, output.read())


def _sample(leader: psutil.Process, cpu: dict[int, float]) -> int:
    """Resident bytes of a family of processes; notes the processor time that each has used so far."""
    total = 0
    with suppress(psutil.Error):  # one ended meanwhile; the next sample is soon
        for process in (leader, *leader.children(recursive=True)):
            total += process.memory_info().rss
            times = process.cpu_times()
            cpu[process.pid] = times.user + times.system
    return total


def ours(corpus: Path, tokenizer: Path, folder: Path, workers: int) -> Run:
    output = folder / "store"
    shutil.rmtree(output, ignore_errors=True)
    arguments = ["--input", corpus, "--tokenizer", tokenizer, "--output", output, "--workers", workers, "--quiet"]
    result = run([sys.executable, "-m", "zeropipe.data_prep.cli", "prepare", *map(str, arguments)])
    shutil.rmtree(output)
    return result


def raw(corpus: Path, tokenizer: Path) -> Run:
    return run([sys.executable, "-c", RAW, str(corpus), str(tokenizer / "tokenizer.json")])


def compare_with_limit(corpus: Path, text: int, args: argparse.Namespace, folder: Path) -> float:
    """Prints both speeds and their ratios, and returns this project's in bytes of text per second."""
    tokenizer = args.hugging_face
    pairs = [(raw(corpus, tokenizer), ours(corpus, tokenizer, folder, args.workers)) for _ in range(args.turns)]
    limit, own = (statistics.median(run.seconds for run in runs) for runs in zip(*pairs, strict=True))
    inside = statistics.median(float(run.output) for run, _ in pairs)
    ratios = [a.seconds / b.seconds for a, b in pairs]
    row("gigatoken encode_files, inside", text / inside)
    row("gigatoken encode_files, process", text / limit, max(run.peak for run, _ in pairs))
    row("zeropipe prepare, process", text / own, max(run.peak for _, run in pairs))
    print(f"    of the limit, process to process, turn by turn: {', '.join(f'{ratio:.0%}' for ratio in ratios)}")
    print(f"    of the limit, process to inside: {inside / own:.0%}")
    shares = ", ".join(f"{a.cpu / b.cpu:.0%}" for a, b in pairs)
    print(f"    of the limit, in processor time: {shares}")
    return text / own


def compare_with_peers(corpus: Path, own: float, args: argparse.Namespace, folder: Path) -> None:
    """On the first `--peer-size` bytes, as they are slow. Prints speeds and how many times faster this project is."""
    parts = [folder / f"peers/{number}.jsonl" for number in range(args.workers)]  # datatrove deals out whole files
    parts[0].parent.mkdir()
    text = 0
    with corpus.open("rb") as source:
        for part in parts:
            with part.open("wb") as target:
                while target.tell() < args.peer_size // len(parts) and (line := source.readline()):
                    target.write(line)
                    text += len(orjson.loads(line)["text"].encode())
    workers = str(args.workers)
    tokenizer = str(args.hugging_face)
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    peer = run(
        [sys.executable, "-c", DATASETS, f"{parts[0].parent}/*", tokenizer, str(folder / "cache"), workers], **quiet
    )
    row(f"datasets.map, {workers} processes", text / peer.seconds, peer.peak)
    print(f"    zeropipe is {own / (text / peer.seconds):.0f} times as fast")
    if args.datatrove:
        command = [
            args.datatrove,
            "-c",
            DATATROVE,
            str(parts[0].parent),
            f"{tokenizer}/tokenizer.json",
            str(folder / "dt"),
        ]
        peer = run([*command, workers], **quiet)
        row(f"datatrove, {workers} workers", text / peer.seconds, peer.peak)
        print(f"    zeropipe is {own / (text / peer.seconds):.0f} times as fast")
    else:
        print("datatrove: not measured (name a Python that has it with --datatrove)")


def row(what: str, speed: float, peak: int | None = None) -> None:
    print(f"{what:36} {speed / 1e6:8.1f} MB/s" + (f"   peak {peak / 1e6:6.0f} MB" if peak else ""), flush=True)


def train_tokenizer(store: Path) -> Path:
    words = ["--builtin", "stdlib", "--train-tokenizer", "16384", "--quiet", "--output", str(store)]
    subprocess.run([sys.executable, "-m", "zeropipe.launcher", "prepare", *words], check=True)
    return store / "tokenizer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="a Hugging Face folder, or vocab.json + merges.txt; default: one trained on the standard library",
    )
    parser.add_argument("--sizes", type=byte_count, nargs="+", default=[200_000_000], help="of text: 200M 1G 4G")
    parser.add_argument("--peer-size", type=byte_count, default=20_000_000, help="of jsonl, for the slow peers")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--datatrove", metavar="PYTHON", help="a Python in which datatrove is installed")
    parser.add_argument("--folder", type=Path, help="where to work (a temporary folder)")
    args = parser.parse_args()
    from zeropipe.data_prep.tokenizer import adopt_tokenizer

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        args.hugging_face = folder / "tokenizer"
        adopt_tokenizer(args.tokenizer or train_tokenizer(folder / "stdlib"), args.hugging_face, None)
        corpus = folder / "corpus.jsonl"
        for number, wanted in enumerate(args.sizes):
            text = write_jsonl(corpus, wanted)
            print(f"\n{text / 1e6:,.0f} MB of text, {args.workers} workers, {os.cpu_count()} cores")
            if number == 0:
                own = compare_with_limit(corpus, text, args, folder)
                compare_with_peers(corpus, own, args, folder)
            result = ours(corpus, args.hugging_face, folder, args.workers)
            row("zeropipe prepare", text / result.seconds, result.peak)
            print(f"    {result.cpu / text * 1e9:.1f} s of processor time per GB")


if __name__ == "__main__":
    main()
