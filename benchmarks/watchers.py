"""What it costs a step to be watched: keeper and heartbeat, flight recorder, pace of the ranks, loss spikes, replicas.

The same GPT-2 on two ranks with a step of about 0.3 s, in turn: bare `deepspeed` with nothing watched, and a supervised
launch with all of it (`on_bad_step.spike`, `check_replicas` every 100 steps, `log.every: 10`). The ratio of two such
runs is within what a busy machine does to it, so the parts are measured by themselves as well, in the same steps:
seconds inside the watchers' calls, processor time of a rank's keeper and of the launcher, and a small all-reduce of two
ranks with and without torch's flight recorder, as often as a step has collectives.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NOTES, RECORDER = "WATCHERS_NOTES", "WATCHERS_RECORDER"
SHAPE = {"model_type": "gpt2", "n_layer": 2, "n_embd": 256, "n_head": 4, "n_positions": 256}
SEQ, RANKS, UNTIMED, CALLS = 256, 2, 20, 3000
LIMIT = 0.01  # of a step
# what a rank does because it is watched, by what it is for
WATCHERS = {
    "heartbeat": [("trainer.keeper.pulse", "Pulse", ("step", "beat"))],
    "requests": [("trainer.run.guard", "StopRequest", ("look",))],
    "pace": [
        ("trainer.engine.pace", "Pace", ("begin", "row", "_enter", "_leave")),
        ("trainer.metrics.record", "", ("by_host",)),
    ],
    "bad steps": [("trainer.engine.bad_steps", "BadSteps", ("judge", "left_out"))],
    "replicas": [("trainer.engine.replicas", "Replicas", ("check_if_due",))],
}


class Notes:
    """Seconds inside the watchers' calls of this rank since the untimed steps, and its keeper's processor time."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / os.environ["RANK"]
        self._spent, self._steps = dict.fromkeys(WATCHERS, 0.0), 0
        self._before: dict[str, Any] = {}

    def install(self) -> None:
        for title, places in WATCHERS.items():
            for module, owner, names in places:
                holder = importlib.import_module(f"zeropipe.{module}")
                holder = getattr(holder, owner) if owner else holder
                for name in names:
                    setattr(holder, name, self._timed(title, getattr(holder, name)))
        from zeropipe.trainer.metrics.record import RunLog

        RunLog.step = self._after_step(RunLog.step)  # type: ignore[method-assign]

    def _timed(self, title: str, call: Any) -> Any:
        @functools.wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self._spent[title] += time.perf_counter() - began

        return timed

    def _after_step(self, call: Any) -> Any:
        @functools.wraps(call)
        def step(*arguments: Any) -> None:
            call(*arguments)
            self._steps += 1
            now = self._now()
            if self._steps == UNTIMED:
                self._before = now
            elif self._before:
                self._file.write_text(json.dumps({key: now[key] - self._before[key] for key in now}))

        return step

    def _now(self) -> dict[str, float]:
        import psutil
        from torch._C import _distributed_c10d as c10d

        keeper = psutil.Process(os.getppid()).cpu_times()
        dump = getattr(c10d, "_dump_nccl_trace_json", None) or c10d._dump_fr_trace_json
        entries = json.loads(dump(includeCollectives=True, onlyActive=False)).get("entries") or [{"record_id": 0}]
        return {
            **self._spent, "keeper": keeper.user + keeper.system, "collectives": entries[-1]["record_id"],
            "steps": self._steps, "seconds": time.monotonic(),
        }  # fmt: skip


def rank() -> int:
    """One rank of ours, timed where it is watched."""
    if folder := os.environ.get(NOTES):
        Notes(Path(folder)).install()
    from zeropipe.trainer.commands.train import main

    return main()


def recorder_rank() -> None:
    """Seconds of a small all-reduce among two ranks, with or without a flight recorder; printed by rank 0."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    data, times = torch.ones(8), []
    for _ in range(CALLS):
        began = time.perf_counter()
        dist.all_reduce(data.fill_(1.0))
        times.append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        print(statistics.fmean(sorted(times)[: CALLS * 9 // 10]))  # without those that were interrupted
    dist.destroy_process_group()


def recorder_cost(port: int) -> float:
    """Seconds that the flight recorder adds to a collective: the median of turns of with against without."""
    found: dict[str, list[float]] = {"0": [], "256": []}
    for turn in range(6):
        for size in ("0", "256"):
            ranks = []
            for number in range(2):
                place = {"RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port + turn}
                environment = {**os.environ, RECORDER: "1", "TORCH_FR_BUFFER_SIZE": size, "OMP_NUM_THREADS": "1"}
                environment |= {name: str(value) for name, value in place.items()}
                words = [sys.executable, __file__]
                ranks.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
            said = [process.communicate()[0] for process in ranks]
            found[size].append(float(said[0]))
    return statistics.median(b - a for a, b in zip(*found.values(), strict=True))


def write_pair(work: Path, steps: int, watched: bool) -> list[str]:
    """Recipe and JSON of a run, as the arguments of a rank."""
    recipe = {
        "name": "watched" if watched else "bare",
        "output": str(work / "run"),
        "model": {"config": SHAPE},
        "data": {"train": [{"store": str(work / "store")}], "split": "1", "seq_len": SEQ},
        "batch": {"global": RANKS},
        "duration": {"steps": steps},
        "eval": {"every": 0},
        "save": {"every": 0},
        "log": {"sinks": [], "every": 10 if watched else 10**9},
        "resume": "never",
    }
    if watched:
        recipe |= {"on_bad_step": {"type": "stop", "spike": 8.0, "window": 32}, "check_replicas": 100}
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    json_of = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
    }  # fmt: skip
    (work / "ds.json").write_text(json.dumps(json_of))
    return ["--run", str(work / "recipe.yaml"), "--deepspeed_config", str(work / "ds.json")]


def run_bare(work: Path, steps: int) -> float:
    """Median seconds of a step without anybody watching."""
    words = [str(BIN / "deepspeed"), "--num_accelerators", str(RANKS), "--module", "zeropipe.trainer"]
    words += write_pair(work, steps, watched=False)
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return step_seconds(work)


def run_watched(work: Path, steps: int, notes: Path | None = None) -> tuple[float, float]:
    """Median seconds of a step of a supervised launch, and the share of a core that the launcher itself took."""
    from zeropipe.launcher.command import Launch
    from zeropipe.launcher.running import start
    from zeropipe.trainer.ranks.ports import free_port

    arguments = tuple(write_pair(work, steps, watched=True))
    if notes is not None:
        os.environ[NOTES] = str(notes)
    module = "benchmarks.watchers" if notes is not None else "zeropipe.trainer"
    began, used = time.monotonic(), time.process_time()
    with silent():
        code = start(Launch(arguments, RANKS, master_port=free_port(), module=module), work / "run")
    share = (time.process_time() - used) / (time.monotonic() - began)
    os.environ.pop(NOTES, None)
    if code:
        sys.exit(f"the supervised launch ended with {code}")
    return step_seconds(work), share


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What the ranks print goes nowhere."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)


def step_seconds(work: Path) -> float:
    lines = (work / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return statistics.median([record["step_seconds"] for record in records if record["kind"] == "train"][UNTIMED:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    from train import make_store

    from zeropipe.trainer.ranks.ports import free_port

    print(__doc__)
    print(f"load before: {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_store(work / "store", (arguments.steps + 1) * RANKS * SEQ)
        turns = []
        for _ in range(arguments.rounds):
            bare = run_bare(work, arguments.steps)
            turns.append((bare, run_watched(work, arguments.steps)[0]))
            print(f"bare {turns[-1][0]:.4f} s, watched {turns[-1][1]:.4f} s a step", flush=True)
        ratios = [watched / bare for bare, watched in turns]
        print(f"watched / bare: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        (work / "notes").mkdir()
        step, launcher = run_watched(work, arguments.steps, work / "notes")
        notes = [json.loads((work / "notes" / str(number)).read_text()) for number in range(RANKS)]
        show_parts(notes, step, launcher, recorder_cost(free_port()))


def show_parts(notes: list[dict[str, float]], step: float, launcher: float, recorder: float) -> None:
    print(f"\nof a step of {step:.3f} s, in the rank where it takes longest")
    parts = {title: max(note[title] / note["steps"] for note in notes) for title in WATCHERS}
    collectives = max(note["collectives"] / note["steps"] for note in notes)
    parts[f"flight recorder ({collectives:.0f} collectives)"] = collectives * recorder
    parts["keeper's processor time"] = max(note["keeper"] / note["steps"] for note in notes)
    parts["launcher's processor time"] = launcher * step
    for title, seconds in parts.items():
        print(f"{title:>36} {1e6 * seconds:9.1f} us  {100 * seconds / step:7.3f} %")
    whole = sum(max(0.0, seconds) for seconds in parts.values())
    verdict = "" if whole <= LIMIT * step else f"  above {100 * LIMIT:g} %"
    print(f"{'together':>36} {1e6 * whole:9.1f} us  {100 * whole / step:7.3f} %{verdict}")
    print(f"load after: {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    if os.environ.get(RECORDER):
        recorder_rank()
    elif os.environ.get(NOTES) and "RANK" in os.environ:
        from zeropipe.trainer.keeper.keeper import under_keeper

        code = under_keeper(rank)
        sys.stdout.flush()
        os._exit(code)
    else:
        main()
