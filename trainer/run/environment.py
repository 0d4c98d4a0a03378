"""What a run ran on: versions, git revision, hosts, devices, command line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

PACKAGES = ("zeropipe", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "peft")


def describe_host() -> dict[str, Any]:
    """This rank's host and device; gather them over the ranks for `environment`. Needs DeepSpeed's accelerator."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    return {
        "host": socket.gethostname(),
        "rank": int(os.environ.get("RANK", 0)),
        "device": platform.machine() + " cpu" if on_cpu else accelerator.current_device_name(),
        "device_name": _cpu_name() if on_cpu else _accelerator_name(accelerator),
        "cpus": len(os.sched_getaffinity(0)),
    }


def environment(run: str, hosts: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The environment record of one process group."""
    return {
        "run": run,
        "command": shlex.join([sys.executable, *sys.orig_argv[1:]]),
        "directory": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "git": git_revision(),
        "code": code_digest(),
        "hosts": list(hosts) or [{"host": socket.gethostname()}],
        "variables": {key: os.environ[key] for key in sorted(os.environ) if _matters(key)},
    }


def versions() -> dict[str, str]:
    """Of the packages that a result may depend on, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # peft is optional
            continue
    return found


def git_revision() -> str | None:
    """Revision of the working directory, with "+changes" when tracked files differ; None outside a repository."""
    try:
        revision = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+changes" if changed else "")


def code_digest() -> str:
    """Of the Python files of this package: two hosts with one digest run the same code, in or out of a repository."""
    digest = xxhash.xxh3_64()
    for room in ("data_prep", "trainer", "launcher"):
        spec = importlib.util.find_spec(f"zeropipe.{room}")
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{room}/{path.relative_to(root)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    return subprocess.run(
        ("git", *arguments), capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL
    ).stdout.strip()


def _matters(key: str) -> bool:
    names = ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "MASTER_ADDR", "DS_ACCELERATOR")
    return key in names or key.startswith(("NCCL_", "GLOO_", "OMP_", "TORCH_", "UCX_"))


def _accelerator_name(accelerator: Any) -> str:
    import torch

    backend = getattr(torch, accelerator.device_name(), None)
    name = getattr(backend, "get_device_name", accelerator.device_name)
    return name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
