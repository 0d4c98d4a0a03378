"""What transformers' declarations of a family leave open or get wrong, found by the parity gate; `scripts/families.py`
tries them all. By `model_type`.
"""

from __future__ import annotations

from collections.abc import Mapping

from .derived import SUMMED

# the axes without a layout, and why
OVERRIDES: Mapping[str, Mapping[str, str]] = {
    "doge": {"tensor": "its mask is made for all heads on every rank, which its plan does not split"},
}
# what their plans (`base_model_tp_plan`) leave out
MORE_WORDS: Mapping[str, Mapping[str, str]] = {
    "apertus": {"layers.*.mlp.act_fn": SUMMED},  # its weights sit between the split projections
}
# families that are not trained at all, and why
UNTRAINED: Mapping[str, str] = {
    "phimoe": "its router draws experts at random in training, whatever its noise is set to: no two layouts would be "
    "the same run",
    "deepseek_v4": "whole numbers (a table of experts) are among its weights, which checkpoints have no place for",
}
