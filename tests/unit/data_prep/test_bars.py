"""Bars on a terminal, a real one of a child's, and plain lines or nothing elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_store
from zeropipe.data_prep.making.bars import Bar
from zeropipe.data_prep.verify import verify


def on_a_terminal(*words: str, cwd: Path) -> tuple[int, str, str]:
    """Exit code, standard output, and what the command draws on a terminal that is its stderr."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "zeropipe.launcher", *words]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment) as child:
        os.close(theirs)
        drawn = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the child has gone
                break
            if not piece:
                break
            drawn += piece
        assert child.stdout is not None
        out = child.stdout.read()
    os.close(ours)
    return child.returncode, out, drawn.decode()


def test_a_store_is_prepared_and_verified_with_bars_on_a_terminal_and_without_elsewhere(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"some words {number} " * 400)
    prepare = ["prepare", "--input", "text", "--train-tokenizer", "300", "--output", "store", "--workers", "0"]
    code, out, drawn = on_a_terminal(*prepare, cwd=tmp_path)
    assert code == 0 and "40 documents" in out, drawn
    assert (
        re.search(r"prepare .*%.* documents/s .* MB/s .* tokens/s .*\d:\d\d", drawn) and "training a tokenizer" in drawn
    )
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 1, "the cursor is hidden, and comes back"
    code, out, drawn = on_a_terminal("verify", "store", cwd=tmp_path)
    assert (code, out) == (0, "whole: store\n") and re.search(r"verify .*100%.*iB/s|verify .* B/s", drawn)
    command = [sys.executable, "-m", "zeropipe.launcher", "verify", "store"]
    plain = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (plain.returncode, plain.stdout, plain.stderr) == (0, "whole: store\n", "")


def test_all_of_a_store_is_counted(tmp_path):
    told: list[tuple[float, float]] = []
    assert verify(tiny_store(tmp_path / "store"), told=lambda done, total: told.append((done, total))) == []
    assert told == sorted(told) and told[-1][0] == told[-1][1] > 0


def test_nothing_is_drawn_elsewhere_and_what_fails_fails(capsys):
    def fails() -> None:
        with Bar("work") as bar:
            bar(1, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert capsys.readouterr().err == ""
