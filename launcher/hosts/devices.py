"""What this machine has to compute on, without importing torch: a login node must stay quick."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ...data_prep.errors import UserError

# device files of the accelerators that DeepSpeed knows, one per device: NVIDIA, Habana Gaudi, Ascend
DEVICE_FILES = ("nvidia[0-9]*", "accel/accel[0-9]*", "davinci[0-9]*")
AMD = "kfd"  # one file for all of AMD's, whose number then comes from the render nodes


def count_accelerators(dev: Path = Path("/dev")) -> int:
    """Number of accelerators on this machine by their device files; 0 is a machine with CPUs only."""
    found = max(len(list(dev.glob(pattern))) for pattern in DEVICE_FILES)
    if not found and (dev / AMD).exists():
        found = len(list((dev / "dri").glob("renderD*")))
    return found


def visible_devices(environ: Mapping[str, str]) -> list[int] | None:
    """The devices that CUDA_VISIBLE_DEVICES leaves to this process, None where it says nothing.

    Raises:
        UserError: it names devices by UUID, which DeepSpeed's launcher cannot take.
    """
    text = environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not text:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"CUDA_VISIBLE_DEVICES={text}: DeepSpeed's launcher takes numbers only, such as 0,1") from None


def cpu_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
