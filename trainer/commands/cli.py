"""The trainer's verbs, one file each."""

from __future__ import annotations

import argparse

from . import chat, evaluate, export, generate, parity, replay, report, train, tune, verify
from .ckpt import checkpoints


def register(verbs: argparse._SubParsersAction) -> None:
    """Adds this room's verbs to the command line."""
    for verb in (train, evaluate, generate, chat, export, checkpoints, report, replay, parity, tune, verify):
        verb.register(verbs)
