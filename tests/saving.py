"""One checkpoint, saved and waited for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zeropipe.trainer.checkpoint.deepspeed_state import Live
from zeropipe.trainer.checkpoint.writer import SnapshotWriter


def save(
    live: Live,
    output: Path,
    state: Mapping[str, Any],
    keep: int | None = None,
    probe: Mapping[str, Tensor] | None = None,
    background: bool = True,
) -> Path:
    """Its folder. Collective over all ranks."""
    writer = SnapshotWriter(output, None, keep, total_steps=0, background=background)
    writer.save(live, state, probe)
    return writer.wait()[-1]
