"""Held-out loss, perplexity and bits per byte: during training through the engine, afterwards in one process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EvalResult:
    """The mean negative log likelihood of held-out tokens."""

    loss: float  # nats per predicted token
    tokens: int  # predicted
    bytes_per_token: float | None = None  # UTF-8 bytes of text per predicted token

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """What the model pays per byte of text: comparable between tokenizers."""
        return None if self.bytes_per_token is None else self.loss / math.log(2) / self.bytes_per_token

    def record(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "eval_tokens": self.tokens,
        }

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}{bits} ({self.tokens:,} tokens)"
