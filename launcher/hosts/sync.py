"""Sends files of this host to the same paths on others, over ssh."""

from __future__ import annotations

import importlib.util
import io
import shlex
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...data_prep.errors import UserError
from .ssh import ssh_command

_ROOMS = ("data_prep", "trainer", "launcher", "ds_configs", "recipes")
_CODE = (".py", ".json", ".yaml")
SEND_SECONDS = 300


def send_files(wanted: Mapping[str, Sequence[Path]], port: int | None) -> None:
    """Makes the current folder on every host named, and puts its files there at the paths that they have here.

    Raises:
        UserError: a host did not take them.
    """
    # what runs there keeps the files that it has open: tar removes them before it writes the new ones
    command = f"mkdir -p {shlex.quote(str(Path.cwd()))} && tar -xzpf - -C / --unlink-first --no-same-owner"
    archives = {tuple(paths): _archive(paths) for paths in wanted.values()}
    with ThreadPoolExecutor(32) as pool:
        said = list(
            pool.map(lambda name: _send(ssh_command(name, port, command), archives[tuple(wanted[name])]), wanted)
        )
    problems = [f"{name}: {problem}" for name, problem in zip(wanted, said, strict=True) if problem]
    if problems:
        raise UserError("\n  ".join(["--sync: not all hosts took the files:", *problems]))


def _archive(paths: Sequence[Path]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for path in paths:
            tar.add(path.absolute(), arcname=str(path.absolute()).lstrip("/"), recursive=False)
    return content.getvalue()


def own_code() -> list[Path]:
    """The files of this package, wherever it is installed."""
    top = importlib.util.find_spec("zeropipe")  # what Python users import, of no file where an installation is older
    found = [Path(top.origin)] if top is not None and top.origin is not None else []
    for room in _ROOMS:
        spec = importlib.util.find_spec(f"zeropipe.{room}")
        assert spec is not None and spec.origin is not None
        found += [path for path in sorted(Path(spec.origin).parent.rglob("*")) if path.suffix in _CODE]
    return found


def _send(command: Sequence[str], content: bytes) -> str | None:
    try:
        done = subprocess.run(list(command), input=content, capture_output=True, timeout=SEND_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {SEND_SECONDS} seconds"
    return (
        (done.stderr.decode(errors="replace").strip().splitlines() or ["tar failed"])[-1] if done.returncode else None
    )
