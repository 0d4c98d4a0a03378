"""The table of parameters: one row per Hugging Face parameter, for initialisation, tensor parallelism, pipeline stages,
checkpoints, export and the memory plan. Needs no torch, so that a login node can plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...data_prep.errors import UserError
from .derived import Derived
from .param_spec import ParamSpec, Split
from .registry import FAMILIES, family_of

__all__ = ["ParamSpec", "Split", "gradient_noise", "padded_vocab", "parameter_seed", "parameter_table", "trained_vocab"]

VOCAB_MULTIPLE = 128  # the vocabulary is padded to a multiple of this times the tensor parallel size


def parameter_seed(seed: int, name: str) -> int:
    """Seed of one parameter's initial values: depends on the run's seed and the name, never on the layout."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch takes a non-negative int64


def padded_vocab(vocab_size: int, tensor: int = 1) -> int:
    """Vocabulary as trained: rounded up so that every tensor-parallel rank holds a multiple of 128 rows."""
    multiple = VOCAB_MULTIPLE * tensor
    return -(-vocab_size // multiple) * multiple


def trained_vocab(config: Mapping[str, Any], tensor: int = 1) -> int:
    """The vocabulary as the model of a configuration is trained with it: padded, where that is possible."""
    family = family_of(config)
    pads = not isinstance(family, Derived) or family.pads
    return padded_vocab(config["vocab_size"], tensor) if pads else config["vocab_size"]


def parameter_table(config: Mapping[str, Any], tensor: int = 1, expert: int = 1) -> list[ParamSpec]:
    """The parameters of a model, in Hugging Face's order, tied ones once.

    Args:
        config: transformers' own configuration names, `model_type` and `vocab_size` among them.
        tensor: tensor parallel size, which the padding of the vocabulary depends on.
        expert: ranks that share the experts of a layer; with more than one, their stacks are cut over those.

    Raises:
        UserError: the family has no record, and none can be derived.
    """
    family = family_of(config)
    if family is None:
        raise UserError(
            f"model.config.model_type: no parameter table for {config.get('model_type', '')!r}: without torch and "
            f"transformers there are tables for {', '.join(FAMILIES)}"
        )
    table = family.table(config, padded_vocab(config["vocab_size"], tensor))
    if expert == 1 or not isinstance(family, Derived):
        return table
    return [replace(spec, kind="expert", split=Split(0)) if family.is_of_experts(spec) else spec for spec in table]


def gradient_noise(config: Mapping[str, Any]) -> dict[str, slice]:
    """Parameters of which some elements have a gradient of nothing but rounding noise, which Adam blows up to full
    steps: the bias of GPT-2's keys, which softmax does not see. Those elements differ from layout to layout.
    """
    family = family_of(config)
    if family is None or not family.noise:
        return {}
    rows = ((spec, family.noise.get(family.relative(spec) or "")) for spec in parameter_table(config))
    return {spec.name: slice(*spec.ranges(0, 1)[part]) for spec, part in rows if part is not None}
