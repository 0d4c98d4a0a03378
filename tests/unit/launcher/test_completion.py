"""What shells complete, asked of the shells themselves (bash always, zsh and fish where they are installed)."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zeropipe.launcher.cli import main

pytest.importorskip("shtab", reason="needs shtab: pip install 'zeropipe[completion]'")


def script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", shell]) == 0
    path = tmp_path / ("_zeropipe" if shell == "zsh" else f"zeropipe.{shell}")
    path.write_text(capsys.readouterr().out)
    return path


def test_bash(tmp_path, capsys):
    path = script("bash", tmp_path, capsys)
    (tmp_path / "mine.yaml").touch()

    def offered(*words: str) -> set[str]:
        ask = (
            f"source {path}; COMP_WORDS=(zeropipe {' '.join(words)} ''); COMP_CWORD=$((${{#COMP_WORDS[@]}}-2)); "
            'COMP_WORDS=("${COMP_WORDS[@]:0:COMP_CWORD+1}"); '
            "$(complete -p zeropipe | sed 's/.*-F \\([^ ]*\\) .*/\\1/') zeropipe; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    assert {"plan", "parity"} == {word for word in offered("p") if word != "prepare"}
    assert "--devices" in offered("launch", "--dev")
    assert offered("ckpt", "ver") == {"verify"}
    assert offered("prepare", "--format", "s") >= {"sft"}
    assert offered("plan", "mi") == {"mine.yaml"}
    assert offered("completion", "z") == {"zsh"}


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish(tmp_path, capsys):
    path = script("fish", tmp_path, capsys)
    for line, word in {
        "zeropipe pari": "parity",
        "zeropipe launch --dev": "--devices",
        "zeropipe ckpt ver": "verify",
    }.items():
        ask = ["fish", "--no-config", "-c", f"source {path}; complete -C '{line}'"]
        done = subprocess.run(
            ask, capture_output=True, text=True, timeout=60, env={**os.environ, "HOME": str(tmp_path)}
        )
        assert word in [offered.split("\t")[0] for offered in done.stdout.splitlines()], done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh(tmp_path, capsys):
    """Tab on a terminal, as a person presses it."""
    script("zsh", tmp_path, capsys)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execve(
            shutil.which("zsh") or "",
            ["zsh", "-f", "-i"],
            {"TERM": "dumb", "PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        )
    try:
        os.write(terminal, f"fpath=({tmp_path} $fpath); autoload -U compinit; compinit -u; PS1=ready%%\n".encode())
        until(terminal, "ready%", 2)
        os.write(terminal, b"zeropipe pari\t")
        until(terminal, "zeropipe parity", 1)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(terminal)


def until(terminal: int, words: str, times: int) -> None:
    text, deadline = "", time.monotonic() + 60
    while text.count(words) < times:
        assert time.monotonic() < deadline, text
        if select.select([terminal], [], [], 0.2)[0]:
            text += os.read(terminal, 4096).decode(errors="replace")


def test_without_its_library_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'zeropipe[completion]'" in capsys.readouterr().err
