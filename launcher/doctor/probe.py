"""What one host is and has, as plain values; run there. Nothing here imports torch or needs root."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import xxhash

from ...data_prep.lock import LockedError, lock_file
from ...trainer.run.environment import code_digest, versions
from ..hosts.devices import count_accelerators, cpu_cores


def facts(files: Sequence[str], output: str) -> dict[str, Any]:
    """Everything about this host that needs no other one.

    Args:
        files: which of them are here, and what is in them; paths from the current folder.
        output: the run directory, or where it will be.
    """
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return {
        "name": socket.gethostname(),
        "python": platform.python_version(),
        "versions": versions(),
        "code": code_digest(),
        "files": {name: file_hash(Path(name)) for name in files},
        "accelerators": count_accelerators(),
        "cores": cpu_cores(),
        "disk": _free(Path(output)),
        "shared_memory": _free(Path("/dev/shm")),
        "memory": psutil.virtual_memory().available,
        "interfaces": sorted(psutil.net_if_stats()),
        "addresses": addresses(),
        "compiler": shutil.which(os.environ.get("CXX", "c++")),
        "ninja": shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent)),
        "nvcc": shutil.which("nvcc") or shutil.which("nvcc", path=f"{cuda}/bin"),
        "build_locks": build_locks(os.environ),
    }


def file_hash(path: Path) -> str | None:
    """Of what is in the file; None where there is none."""
    try:
        return xxhash.xxh3_64(path.read_bytes()).hexdigest()
    except OSError:
        return None


def addresses() -> list[list[str]]:
    """Interface and IPv4 address of every interface that is up, without the loopback."""
    state = psutil.net_if_stats()
    return [
        [name, item.address]
        for name, items in psutil.net_if_addrs().items()
        for item in items
        if item.family == socket.AF_INET and not item.address.startswith("127.") and state[name].isup
    ]


def build_locks(environ: Mapping[str, str]) -> list[list[Any]]:
    """Locks in the folder where torch builds extensions, with their age in seconds: one left behind hangs ranks."""
    home = environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    found = []
    for path in [*Path(home).glob("*/lock"), *Path(home).glob("*/*/lock")]:
        try:
            found.append([str(path), time.time() - path.stat().st_mtime])
        except OSError:  # it is gone: whoever held it has ended
            continue
    return found


def _free(path: Path) -> int | None:
    """Free bytes where `path` is, or will be."""
    for place in (path, *path.absolute().parents):
        if place.exists():
            return shutil.disk_usage(place).free
    return None


def leave_token(path: str, token: str) -> None:
    """Writes a file for the other hosts to read."""
    Path(path).write_text(token, encoding="ascii")


def read_tokens(folder: str) -> dict[str, str]:
    """Every token in a folder."""
    return {path.name: path.read_text(encoding="ascii") for path in Path(folder).glob("token-*")}


def locked_elsewhere(path: str) -> bool:
    """Whether another host's lock on `path` is seen from here."""
    try:
        lock_file(Path(path)).close()
    except LockedError:
        return True
    return False
