"""The initial master weights of a run in 16 bits: DeepSpeed makes them from weights that are rounded already."""

from __future__ import annotations

import torch

from ..checkpoint.boxes import pieces
from ..checkpoint.deepspeed_state import holdings
from ..checkpoint.reader import MASTER
from ..modeling.values import Values
from .base import Engine


@torch.no_grad()
def fill_masters(engine: Engine, values: Values) -> None:
    """Puts the values of `model.init` into the masters that this rank holds. The weights stay as they are: the same
    values, rounded. What an adapter has put in is not of `model.init`.
    """
    ranks = engine.ranks
    for held in holdings(engine.live):
        master = held.views.get(MASTER)
        rounded = master is not None and master.dtype == torch.float32 != engine.dtype
        if not rounded or held.start == held.stop or getattr(held.parameter, "injected", False):
            continue
        whole = values(held.spec)
        for piece in pieces(held.spec, *ranks.along(held.spec.axis)[:2], held.start, held.stop):
            held.view(MASTER, piece.local).copy_(whole[piece.box.slices])
