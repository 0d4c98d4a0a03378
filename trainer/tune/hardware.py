"""What a step is computed on: a table of accelerators, and the record that a measured machine makes of itself.

Peaks are of dense matrices. `reach` is the share of the peak that the best matrix product came to, as published by
S. Bekman, Machine Learning Engineering (github.com/stas00/ml-engineering, compute/accelerator, "Maximum Achievable
Matmul FLOPS"): a step is never faster than that. The rest is what the vendors state:

    A100    NVIDIA A100 datasheet (2021): 312 TFLOP/s bf16, 19.5 fp32, 1,555 or 2,039 GB/s, NVLink 600 GB/s both ways
    H100    NVIDIA H100 SXM datasheet: 989 TFLOP/s bf16, 67 fp32, 3.35 TB/s, NVLink 900 GB/s both ways
    H200    NVIDIA H200 datasheet: H100's arithmetic, 141 GB at 4.8 TB/s
    B200    NVIDIA DGX B200 datasheet over eight: 2,250 TFLOP/s bf16, 75 fp32, 180 GB at 8 TB/s, NVLink 1.8 TB/s
    L40S    NVIDIA L40S datasheet: 362 TFLOP/s bf16, 91.6 fp32, 48 GB at 864 GB/s, PCIe 4 x16 only
    MI300X  AMD Instinct MI300X datasheet: 1,307 TFLOP/s bf16, 163.4 fp32, 192 GB at 5.3 TB/s, 896 GB/s both ways

`tile`, `attention`, `passes`, `logit_passes` and SUSTAINED, the same for all, were fitted on eleven A100 runs of
MosaicML's (benchmarks/published_runs.py), where they leave 4 % of error, 5 % on each when it is left out of the fit.

Networks are those of the vendor's own node: a 200 Gbit/s port for each A100 and L40S, 400 Gbit/s for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...data_prep.errors import UserError, did_you_mean

GB = 1e9
GIB = 1 << 30


@dataclass(frozen=True)
class Link:
    """How a rank reaches others: seconds of a message = latency + bytes / bandwidth.

    Of a collective, the latency is that of a round: a binary tree's depth of them, and twice for an all-reduce.
    """

    bandwidth: float  # bytes a second, one way, of one rank
    latency: float  # seconds


@dataclass(frozen=True)
class Device:
    """One rank's share of a machine. Rates are bytes or floating-point operations a second."""

    name: str
    memory: float  # bytes
    peak: Mapping[str, float]  # of matrix products, by torch's names of types
    bandwidth: float  # of its memory, reading and writing together
    near: Link  # to ranks of the same node
    far: Link  # to ranks of other nodes
    host: Link  # to the memory of its host
    per_node: int = 8
    reach: float = 0.8  # share of the peak that the best product comes to
    tile: float = 350.0  # a product of m x k x n takes 1 + tile (1/m + 1/n + 1/k) times as long as at its best
    attention: float = 0.46  # rate of fused attention, over that of the best product
    passes: float = 6.0  # times that a byte kept for the backward pass crosses the memory, both ways together
    logit_passes: float = 5.0  # and an fp32 logit
    update_bytes: float = 40.0  # that the optimizer's step reads and writes of an element, the clipping included
    host_bandwidth: float = 25 * GB  # of a rank's share of its host's memory
    dispatch: float = 5e-6  # seconds that the host needs for one operation
    queued: bool = True  # whether operations wait in a queue, so that the host's time shows only where it is longer
    crowding: float = 1.0  # ranks that share what one of them would have

    def rate(self, dtype: str) -> float:
        """Of the best matrix product."""
        return self.peak[dtype] * self.reach


SUSTAINED = 0.96  # of the best product ever seen, over a whole step
# a message between GPUs of a node and between nodes, as NCCL needs it; PCIe 4 and 5 x16 as they copy in practice
_NEAR, _FAR = 3e-6, 8e-6
_PCIE4, _PCIE5 = Link(24 * GB, 1e-5), Link(50 * GB, 1e-5)


def _gpu(
    name: str,
    memory: float,
    bf16: float,
    fp32: float,
    bandwidth: float,
    nvlink: float,
    port: float,
    host: Link,
    reach: float,
) -> Device:
    """Args: TFLOP/s, GB/s of memory, GB/s one way inside a node and per GPU between nodes (80 % of which arrive)."""
    peak = {"bfloat16": bf16 * 1e12, "float16": bf16 * 1e12, "float32": fp32 * 1e12}
    near, far = Link(0.8 * nvlink * GB, _NEAR), Link(0.8 * port * GB, _FAR)
    return Device(name, memory, peak, bandwidth * GB, near, far, host, reach=SUSTAINED * reach)


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _gpu("a100-40", 40 * GIB, 312, 19.5, 1555, 300, 25, _PCIE4, 0.869),
        _gpu("a100-80", 80 * GIB, 312, 19.5, 2039, 300, 25, _PCIE4, 0.869),
        _gpu("h100", 80 * GIB, 989, 67, 3350, 450, 50, _PCIE5, 0.803),
        _gpu("h200", 141 * GB, 989, 67, 4800, 450, 50, _PCIE5, 0.803),
        _gpu("b200", 180 * GB, 2250, 75, 8000, 900, 50, _PCIE5, 0.776),
        _gpu("l40s", 48 * GB, 362, 91.6, 864, 32, 25, _PCIE4, 0.75),
        _gpu("mi300x", 192 * GB, 1307, 163.4, 5300, 448, 50, _PCIE5, 0.514),
    )
}
DEVICE_ALIASES = {"a100": "a100-80", "a100-40gb": "a100-40", "a100-80gb": "a100-80", "h100-80gb": "h100"}


def device_named(name: str) -> Device:
    """An accelerator of the table.

    Raises:
        UserError: there is none such; names the nearest.
    """
    word = name.lower().replace("_", "-")
    found = DEVICES.get(DEVICE_ALIASES.get(word, word))
    if found is None:
        raise UserError(
            f"--gpu {name!r}: not in the table{did_you_mean(word, DEVICES)}; there are {', '.join(DEVICES)}, or leave "
            "it out, which measures this machine"
        )
    return found


def with_network(device: Device, per_node: int | None, far_gbit: float | None, memory_gb: float | None) -> Device:
    """The device with the facts of a cluster that the user states.

    Args:
        per_node: devices of a node.
        far_gbit: network between nodes, Gbit/s of each device, as the port is rated.
        memory_gb: of a device, where some of it is taken.
    """
    far = device.far if far_gbit is None else replace(device.far, bandwidth=0.8 * far_gbit / 8 * GB)
    memory = device.memory if memory_gb is None else memory_gb * GB
    return replace(device, per_node=per_node or device.per_node, far=far, memory=memory)


_NUMBERS = {"bf16": 0.0, "memory": 0.0, "bandwidth": 0.0, "nvlink": 32.0, "network": 200.0, "fp32": 0.0}


def parse_device(text: str) -> Device:
    """A device by its numbers: bf16=TFLOP/s,memory=GB,bandwidth=GB/s[,nvlink=GB/s one way][,network=Gbit/s][,fp32=…].

    Raises:
        UserError: an unknown name, no number, or one of the first three is missing.
    """
    found = dict(_NUMBERS)
    for word in text.split(","):
        name, _, value = word.partition("=")
        if name not in _NUMBERS:
            raise UserError(
                f"--gpu {word!r}: there is no {name!r}{did_you_mean(name, _NUMBERS)}; it takes NAME=NUMBER "
                f"of {', '.join(_NUMBERS)}"
            )
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = 0.0
        if not 0 < found[name] < float("inf"):
            raise UserError(f"--gpu {word!r}: expected a number above 0")
    if lacking := [name for name in ("bf16", "memory", "bandwidth") if not found[name]]:
        raise UserError(f"--gpu {text!r}: {', '.join(lacking)} is missing; such as bf16=312,memory=80,bandwidth=2039")
    fp32 = found["fp32"] or found["bf16"] / 16
    port = found["network"] / 8
    sizes = found["memory"] * GB, found["bf16"], fp32, found["bandwidth"], found["nvlink"], port
    return _gpu("GPU as stated", *sizes, _PCIE4, 0.8)
