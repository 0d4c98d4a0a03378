"""Supervised fine-tuning: the mean cross entropy of the trained tokens of records, each token counting alike."""

from __future__ import annotations

from typing import ClassVar

from .causal_lm import CausalLMLoss


class SFT(CausalLMLoss):
    """What is trained of a record was decided when the store was prepared."""

    reads: ClassVar[str] = "sft"
