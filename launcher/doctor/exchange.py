"""One rank of the doctor's all-reduce: `python -m zeropipe.launcher.doctor.exchange`, its variables on its input.

Measures what training waits for: the time of a small all-reduce among all ranks, the bytes a second of a large one, and
how fast every pair of hosts exchanges messages, pairs that share no host at a time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

from .agent import REPLY

FEW_VALUES, MANY_VALUES = 2, 1 << 20  # fp32 values
TURNS = 10
MOST_PAIRED = 32  # hosts: above, each is paired with its next neighbours only
NEIGHBOURS = 4


def pairings(hosts: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of hosts, in which no host stands twice: all pairs, or, of many hosts, the near ones."""
    if hosts > MOST_PAIRED:
        return [
            [((i * 2 * step + j + start) % hosts, (i * 2 * step + j + start + step) % hosts)
             for i in range(hosts // (2 * step)) for j in range(step)]
            for step in range(1, NEIGHBOURS + 1) for start in (0, step)
        ]  # fmt: skip
    even = hosts + hosts % 2
    circle, rounds = list(range(even)), []
    for _ in range(even - 1):
        pairs = [(circle[i], circle[-1 - i]) for i in range(even // 2)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < hosts])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def measure(place: dict[str, str]) -> dict[str, Any]:
    """Seconds and bytes a second, of this rank; `pairs`: of each host's first rank, by the number of a later host."""
    import torch
    import torch.distributed as dist

    from ...trainer.ranks.interface import set_interface

    os.environ.update(place)
    timeout = timedelta(seconds=float(place["SECONDS"]))
    store = set_interface(os.environ, timeout)
    gpu = torch.cuda.is_available() and place["DEVICE"] == "gpu"
    device = torch.device("cuda", int(place["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout)
    del store
    world, size = dist.get_world_size(), MANY_VALUES * (16 if gpu else 1)

    def seconds(values: int, rounds: int) -> float:
        data = torch.ones(values, device=device)
        for turn in range(rounds + 1):  # the first one makes the connections
            if turn == 1:
                dist.barrier()
                began = time.perf_counter()
            data.fill_(1.0)
            dist.all_reduce(data)
        assert data[0].item() == data[-1].item() == world, "the all-reduce did not add up"
        return (time.perf_counter() - began) / rounds

    latency = seconds(FEW_VALUES, TURNS)
    large = seconds(size, 2)
    answer: dict[str, Any] = {"interface": os.environ.get("GLOO_SOCKET_IFNAME"), "latency": latency}
    answer["bandwidth"] = 4 * size * 2 * (world - 1) / world / large if world > 1 else None
    answer["pairs"] = _pairs(json.loads(place["FIRST_RANKS"]), size // 4, device)
    dist.barrier()
    dist.destroy_process_group()
    return answer


def _pairs(first: list[int], values: int, device: Any) -> dict[str, list[float]]:
    """Round-trip seconds of a small message and bytes a second of large ones, with every host it is paired with and
    comes before."""
    import torch
    import torch.distributed as dist

    found, small, large = {}, torch.ones(1, device=device), torch.ones(values, device=device)
    for pairs in pairings(len(first)):
        dist.barrier()
        for low, high in pairs:
            if dist.get_rank() not in (first[low], first[high]):
                continue
            starts = dist.get_rank() == first[low]
            other = first[high] if starts else first[low]
            times = []
            for data, rounds in ((small, 10), (large, 2)):
                turns = []
                for _ in range(rounds + 1):
                    began = time.perf_counter()
                    for sends in (starts, not starts):
                        dist.send(data, other) if sends else dist.recv(data, other)
                    float(data[0])  # waits for the device
                    turns.append(time.perf_counter() - began)
                times.append(min(turns))  # what the link can do, whatever else keeps the hosts busy
            if starts:  # there and back: the other one is done when its answer has gone into a buffer
                found[str(high)] = [times[0], 2 * 4 * values / times[1]]
    return found


if __name__ == "__main__":
    import torch.distributed  # while other hosts are still being asked  # noqa: F401

    try:
        print(REPLY + json.dumps(measure(json.loads(sys.stdin.readline()))), flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
