"""A metric sink of one file: losses as comma-separated values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zeropipe.trainer.sinks.base import SinkSettings
from zeropipe.trainer.sinks.registry import SINKS


class Csv:
    def __init__(self, settings: SinkSettings) -> None:
        self._file = (settings.directory / "losses.csv").open("a")

    def write(self, record: Mapping[str, Any], message: str | None) -> None:
        if record["kind"] == "train":
            self._file.write(f"{record['step']},{record['loss']!r}\n")

    def close(self) -> None:
        self._file.close()


SINKS.register("csv", Csv)
