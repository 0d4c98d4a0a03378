"""Trackio: every step and evaluation, into the run directory or where TRACKIO_DIR or TRACKIO_SPACE_ID say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from .base import PROJECT, SinkSettings, figures


class Trackio:
    """One Trackio run, named by when ours was begun, for as long as it is resumed."""

    def __init__(self, settings: SinkSettings) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(settings.directory.resolve() / "trackio"))  # read when it is imported
        trackio: Any = import_module("trackio")

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{settings.name}-{settings.begun}",
            resume="allow",
            config=dict(settings.configuration),
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def write(self, record: Mapping[str, Any], message: str | None) -> None:
        if found := figures(record):
            self._run.log(found, step=record["step"])

    def close(self) -> None:
        self._run.finish()
