"""This machine as a `Device`, measured: products, memory, attention, element-wise work, the host's own time, links.

The ranks of a CPU share its cores: `cores` of them compute at once at full speed, more of them take turns (`crowding`).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..testing.local_ranks import on_local_ranks
from .compute import FLASH_BACKWARD
from .hardware import GB, SUSTAINED, Device, Link

LARGE, SMALL = 1024, 256  # sides of square products
WIDE = 8  # times as long on an accelerator
PROBE_RUNS = 7
LITTLE, MESSAGE = 1 << 15, 1 << 22  # bytes


def measure_machine(ranks: int) -> Device:
    """One of `ranks` ranks here. Takes some seconds; run it while nothing else does."""
    from ..ranks.ranks import accelerator

    cores = len(os.sched_getaffinity(0))
    on_cpu = accelerator().device_name() == "cpu"
    at_once = min(ranks, cores) if on_cpu else ranks
    computed = _slowest(on_local_ranks(at_once, compute_probe))
    linked = _slowest(on_local_ranks(ranks, link_probe)) if ranks > 1 else {"latency": 0.0, "seconds": 1.0}
    return device_of(computed, linked, ranks, ranks / at_once, on_cpu)


def _slowest(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(one[name] for one in found) for name in found[0]}


def device_of(
    computed: Mapping[str, float], linked: Mapping[str, float], ranks: int, crowding: float, on_cpu: bool
) -> Device:
    """The record that the slowest rank's figures make.

    Args:
        computed, linked: what `compute_probe` and `link_probe` say.
        crowding: ranks that share what one had when it computed.
    """
    bandwidth = computed["copied"] / computed["copy"]
    # an all-reduce sends all but a rank's own share twice
    sent = 2 * MESSAGE * (ranks - 1) / ranks
    latency = linked["latency"] / 2 / max(1, (ranks - 1).bit_length())
    link = Link(sent / max(linked["seconds"] - linked["latency"], linked["seconds"] / 4), latency)
    peak = {dtype: computed[f"{dtype} flops"] / computed[f"{dtype} large"] for dtype in ("float32", "bfloat16")}
    peak["float16"] = peak["bfloat16"]
    found = Device(
        name="this machine",
        memory=computed["memory"],
        peak=peak,
        bandwidth=bandwidth,
        near=link,
        far=link,
        host=Link(25 * GB, 1e-5),
        per_node=ranks,
        reach=SUSTAINED,
        dispatch=computed["dispatch"],
    )
    return _of_a_cpu(found, computed, crowding) if on_cpu else found


def _of_a_cpu(device: Device, computed: Mapping[str, float], crowding: float) -> Device:
    """What accelerators have in common is not true of a CPU, and is measured instead."""
    bandwidth = device.bandwidth
    # two sizes of a product give two equations, for the rate of endlessly large ones and for what small ones lose
    large, small = device.peak["float32"], 2 * SMALL**3 / computed["float32 small"]
    tile = max(0.0, (large - small) / max(3 * (small / SMALL - large / LARGE), 1e-9))
    tile = min(tile, float(SMALL))
    peak = {dtype: rate * (1 + 3 * tile / LARGE) for dtype, rate in device.peak.items()}
    return replace(
        device,
        memory=device.memory / crowding,
        peak=peak,
        host=Link(bandwidth, 0.0),
        host_bandwidth=bandwidth,
        reach=1.0,
        tile=tile,
        attention=computed["attended"] / computed["attention"] / peak["float32"],
        passes=computed["elementwise"] * bandwidth / computed["kept"],
        logit_passes=computed["logits"] * bandwidth / computed["scored"],
        update_bytes=computed["update"] * bandwidth / computed["updated"],
        queued=False,
        crowding=crowding,
    )


def compute_probe() -> dict[str, float]:
    """Seconds of each kind of work on one rank, beside all others, and how much of it that was."""
    import torch
    import torch.nn.functional as F

    from ..modeling.cross_entropy import Scoring
    from ..ranks.ranks import Ranks, accelerator, init_distributed

    ranks = init_distributed(1, 1, 1)
    device, synchronize = ranks.device, accelerator().synchronize
    found: dict[str, float] = {"memory": _memory(ranks)}

    def timed(run: Callable[[], Any]) -> float:
        return _seconds(run, synchronize)

    wide = 1 if device.type == "cpu" else WIDE
    for dtype in (torch.float32, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        for name, side in (("large", LARGE * wide), ("small", SMALL)):
            left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            found[f"{word} {name}"] = timed(lambda a=left, b=right: a @ b)
        found[f"{word} flops"] = 2.0 * (LARGE * wide) ** 3
    block = torch.randn(wide << 24, device=device)
    target = torch.empty_like(block)
    found |= {"copy": timed(lambda: target.copy_(block)), "copied": 2.0 * block.nbytes}

    heads, head, length = 4, 64, 256
    query = torch.randn(1, heads, length, head, device=device, requires_grad=True)
    found["attention"] = timed(
        lambda: F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    )
    found["attended"] = (1 + FLASH_BACKWARD) * 2 * heads * head * length**2

    hidden = torch.randn(512, 1024, device=device, requires_grad=True)
    found |= {"elementwise": timed(lambda: _element_wise(hidden).sum().backward()), "kept": 6.0 * hidden.nbytes}

    logits = torch.randn(256, 4096, device=device)
    labels = torch.zeros(256, dtype=torch.int64, device=device)
    scoring = Scoring(4096, 4096, Ranks(device=device))
    found |= {"logits": timed(lambda: scoring.losses_and_slope(logits.clone(), labels)), "scored": float(logits.nbytes)}

    weights = [torch.nn.Parameter(torch.randn(512, 512, device=device)) for _ in range(4)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW(weights)
    found |= {"update": timed(optimizer.step), "updated": float(sum(weight.numel() for weight in weights))}

    layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8, device=device) for _ in range(50)))
    little = torch.randn(1, 8, device=device)
    found["dispatch"] = timed(lambda: layers(little).sum().backward()) / (3 * len(layers))
    return found


def _element_wise(hidden: Any) -> Any:
    """GELU as GPT-2 has it after a norm: what blocks do between their products."""
    import torch
    import torch.nn.functional as F

    normed = F.layer_norm(hidden, hidden.shape[-1:])
    return 0.5 * normed * (1 + torch.tanh(0.79788456 * (normed + 0.044715 * normed.pow(3))))


def link_probe() -> dict[str, float]:
    """Seconds that all-reduces of LITTLE and of MESSAGE bytes add to a step.

    As in training, every rank computes a little before each: where ranks take turns on a core, the wait for the last
    one is most of it, and it varies, so that the mean counts.
    """
    import torch
    import torch.distributed as dist

    from ..ranks.ranks import accelerator, init_distributed

    ranks = init_distributed(1, 1, 1)
    little, message = (torch.zeros(size // 4, device=ranks.device) for size in (LITTLE, MESSAGE))
    left, right = torch.randn(128, 256, device=ranks.device), torch.randn(256, 1024, device=ranks.device)
    synchronize = accelerator().synchronize

    def work() -> None:
        for _ in range(6):
            torch.mm(left, right)

    def work_and_meet(tensor: Any) -> None:
        work()
        dist.all_reduce(tensor)

    computed = _seconds(work, synchronize, 40, statistics.mean)
    met = [
        _seconds(lambda t=tensor: work_and_meet(t), synchronize, 40, statistics.mean) for tensor in (little, message)
    ]
    return {"latency": max(met[0] - computed, 1e-6), "seconds": max(met[1] - computed, 1e-6)}


def _memory(ranks: Any) -> float:
    """Bytes that a rank may have: its device's, or its share of this machine's."""
    from ..ranks.ranks import accelerator

    if ranks.device.type != "cpu":
        return float(accelerator().total_memory())
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / ranks.world


def _seconds(
    run: Callable[[], Any],
    synchronize: Callable[[], Any],
    repeats: int = PROBE_RUNS,
    middle: Callable[[list[float]], float] = statistics.median,
) -> float:
    found = []
    for _ in range(repeats + 1):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        found.append(time.perf_counter() - started)
    return middle(found[1:])
