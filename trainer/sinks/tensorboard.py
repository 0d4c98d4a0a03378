"""TensorBoard: what people see of the training steps, and every evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import SinkSettings, measurements


class TensorBoard:
    """Scalars by step; what an earlier process wrote beyond the step resumed from is purged."""

    def __init__(self, settings: SinkSettings) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._settings = settings
        folder = settings.directory / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=settings.resumed_from + 1)

    def write(self, record: Mapping[str, Any], message: str | None) -> None:
        kind, step = record["kind"], record["step"]
        if kind == "event" or (kind == "train" and not self._settings.shown(step)):
            return
        prefix = "train/" if kind == "train" else f"eval/{record['split']}_"
        for name, value in measurements(record).items():
            self._writer.add_scalar(prefix + name, value, step)

    def close(self) -> None:
        self._writer.close()
