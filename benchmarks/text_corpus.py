"""A corpus for benchmarks, made of real text that lies on this machine: source code, headers, documentation."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson

SUFFIXES = (".py", ".pyi", ".h", ".hpp", ".c", ".md", ".rst", ".txt", ".html", ".pl", ".pm", ".sh", ".js", ".css")
LETTERS = np.zeros(256, bool)
LETTERS[[*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1)]] = True


def roots() -> list[Path]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    candidates = [
        Path(sysconfig.get_path("purelib")),
        stdlib,
        *sorted(stdlib.parent.parent.parent.glob("[0-9]*/lib")),  # sister Pythons, where there are any
        Path("/usr/lib"),
        Path("/usr/include"),
        Path("/usr/share"),
    ]
    return [path for path in candidates if path.is_dir()]


def texts() -> Iterator[bytes]:
    """Every distinct text file of 200 bytes to 1 MB, UTF-8."""
    seen: set[bytes] = set()
    for root in roots():
        for folder, folders, files in os.walk(root):
            folders.sort()
            for name in sorted(files):
                path = os.path.join(folder, name)
                if not name.endswith(SUFFIXES) or os.path.islink(path) or not 200 <= os.path.getsize(path) <= 1_000_000:
                    continue
                with open(path, "rb") as file:
                    text = file.read()
                digest = hashlib.blake2b(text, digest_size=16).digest()
                if digest not in seen and _is_text(text):
                    seen.add(digest)
                    yield text


def _is_text(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in text


def write_jsonl(path: Path, size: int) -> int:
    """Writes `size` bytes of text or a little more as jsonl, and returns the exact number.

    Where the machine has less, the text is gone through again with one letter in a hundred changed at random, so that
    new words keep coming as they do in real text, and no cache is flattered.
    """
    written, turn = 0, 0
    with path.open("wb") as file:
        while written < size:
            before = written
            for text in texts():
                text = _vary(text, turn) if turn else text
                file.write(orjson.dumps({"text": text.decode(), "turn": turn}) + b"\n")
                written += len(text)
                if written >= size:
                    break
            if written == before:
                raise SystemExit("no text found on this machine")
            turn += 1
    return written


def _vary(text: bytes, turn: int) -> bytes:
    data = np.frombuffer(text, np.uint8).copy()
    random = np.random.default_rng([turn, len(text), int(data[:64].sum())])
    places = np.flatnonzero(LETTERS[data])
    places = places[random.random(len(places)) < 0.01]
    data[places] = random.integers(ord("a"), ord("z") + 1, len(places))
    return data.tobytes()
