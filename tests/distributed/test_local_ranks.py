"""How ranks of this machine are made: forked from a server on CPUs, spawned where there is an accelerator."""

from __future__ import annotations

import os

import pytest
import torch

from zeropipe.trainer.testing import local_ranks
from zeropipe.trainer.testing.local_ranks import on_local_ranks

pytestmark = pytest.mark.distributed


def _parent() -> int:
    return os.getppid()


def test_with_an_accelerator_nothing_is_forked(monkeypatch):
    """CUDA refuses a process that was forked after anyone asked for it, as importing DeepSpeed does: the server's
    children are such processes, and a spawned one is this process's own child."""
    assert on_local_ranks(1, _parent) != [os.getpid()]  # of the server
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert on_local_ranks(1, _parent) == [os.getpid()]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # what DeepSpeed is told counts
    assert not local_ranks._has_accelerator()
