"""What balances the experts of a mixture: `model.router` of a recipe."""

from __future__ import annotations

from pydantic import Field

from .fields import Section


class Router(Section):
    aux_loss: float = Field(default=0.0, ge=0)
    """Weight of the auxiliary loss that balances the experts within each sequence (DeepSeek-V3), of every layer."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the loss that keeps the router's logits small (ST-MoE), of every layer."""
    bias_update: float = Field(default=0.0, ge=0)
    """What a step adds to the bias of experts with less load than the mean, or takes from it (DeepSeek-V3)."""
