"""What transformers' declarations of a family leave open or get wrong: by `model_type`, the axes without a layout, and
why. Found by the parity gate; `scripts/families.py` tries them all.
"""

from __future__ import annotations

from collections.abc import Mapping

OVERRIDES: Mapping[str, Mapping[str, str]] = {
    "doge": {"tensor": "its mask is made for all heads on every rank, which its plan does not split"},
}
