"""The record of a family that nobody has written down: what transformers declares and does. Needs no torch.

It is of one configuration: its rows are those of that very model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .family import Config
from .param_spec import ParamSpec

# transformers' words for what tensor ranks do with a module, or with a parameter that no module of its own holds
COLUMN, PACKED, GATHERED = "colwise", "packed_colwise", "colwise_gather_output"
ROW, SPLIT_ROW = "rowwise", "rowwise_split_input"
SUMMED, LATENT, EXPERTS = "replicated_with_grad_allreduce", "mla_kv_a_proj", "moe_tp_experts"
WHOLE = "local_params"  # says nothing of our parameters, which are plain tensors
COLUMN_WORDS, ROW_WORDS = frozenset({COLUMN, PACKED, GATHERED}), frozenset({ROW, SPLIT_ROW})
WORDS = COLUMN_WORDS | ROW_WORDS | {SUMMED, LATENT, EXPERTS, WHOLE}

# and for what expert ranks do
DISPATCHED, STACKED = "ep_dispatch_experts", "grouped_gemm"

Axis = Literal["tensor", "pipeline", "sequence", "expert"]


@dataclass(frozen=True)
class Derived:
    """All that the product knows of one configuration of a family without a record of its own.

    It answers what a `Family` answers; names are Hugging Face's, of parameters and modules.
    """

    model_type: str
    sizes: Mapping[str, Any]  # standard names → what this configuration comes to
    rows: tuple[ParamSpec, ...]  # unpadded; outside the blocks first, then the blocks, the last norm and the head
    embedding: str
    head: str
    blocks: str | None  # the list of blocks
    norm: str | None  # the last one
    words: Mapping[str, str]  # modules and parameters, numbers as *, → transformers' word for their split
    shape: tuple[float, float] | None  # of the logits, as `logit_shape` says; None: only the model makes them
    pads: bool  # whether the vocabulary can be padded
    tied: bool
    stateful: bool  # whether a state, not attention alone, carries what came before: no mask keeps texts apart in it
    dropout: Mapping[str, str]  # attention, or a key of its own → key
    experts: frozenset[str]  # modules, numbers as *, of experts that ranks can share: tokens go to them and come back
    each_layer: int  # experts in one of those; 0 without any
    refusals: Mapping[Axis, str] = field(default_factory=dict)  # axes that it has no layout on, and why
    aliases: Mapping[str, str] = field(default_factory=dict)  # standard names → the family's own
    # of blocks and norm, kept for backward; not known without running them
    noise: Mapping[str, int] = field(default_factory=dict)
    mlp: None = None
    mlp_bytes: None = None
    norm_bytes: int = 4
    by_text: bool = False  # transformers makes its masks: of sliding windows, say

    def key(self, standard: str) -> str:
        """The family's own name of a key that transformers also knows by a standard one."""
        return self.aliases.get(standard, standard)

    def value(self, config: Config, standard: str) -> Any:
        return self.sizes.get(standard)

    def head_size(self, config: Config) -> int:
        return self.sizes["head_dim"]

    def table(self, config: Config, padded_rows: int) -> list[ParamSpec]:
        """Rows of all parameters, tied ones once."""
        padded = padded_rows if self.pads else None
        return [replace(spec, padded_rows=padded) if spec.kind == "vocab" else spec for spec in self.rows]

    def relative(self, spec: ParamSpec) -> str | None:
        """Name of a block's parameter within the block; None for one outside the blocks."""
        return None if spec.layer is None else spec.name.removeprefix(f"{self.blocks}.{spec.layer}.")

    def is_of_experts(self, spec: ParamSpec) -> bool:
        """Whether a parameter is a stack of experts that ranks can share, [experts, …]."""
        return starred(spec.name.rpartition(".")[0]) in self.experts

    @property
    def splits_heads(self) -> bool:
        """Whether tensor ranks share the heads; else each computes the whole attention, between split projections."""
        return any(word == COLUMN and re.search("attn|attention", name) for name, word in self.words.items())

    def word(self, name: str) -> str | None:
        """What transformers' plan says of a module or parameter."""
        return word_for(self.words, name)


def word_for(words: Mapping[str, str], name: str) -> str | None:
    return words.get(starred(name))


def starred(name: str) -> str:
    """A name with its numbers as *."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
