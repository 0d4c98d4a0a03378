"""TensorBoard: what people see of the training steps, and every evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import SinkSettings, figures


class TensorBoard:
    """Scalars by step; what an earlier process wrote beyond the step resumed from is purged."""

    def __init__(self, settings: SinkSettings) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._settings = settings
        folder = settings.directory / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=settings.resumed_from + 1)

    def write(self, record: Mapping[str, Any], message: str | None) -> None:
        if record["kind"] == "train" and not self._settings.shown(record["step"]):
            return
        for name, value in figures(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()
