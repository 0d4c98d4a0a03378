"""What records need of a tokenizer's folder: how it ends texts, and where generation stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..tokenizer import eos_token, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GENERATION_CONFIG = "generation_config.json"


def require_eos(folder: Path, tokenizer: Tokenizer) -> tuple[str, int]:
    """The token that ends a text, and its id. UserError if the folder names none that the tokenizer knows."""
    token = eos_token(folder)
    number = None if token is None else tokenizer.token_to_id(token)
    if token is None or number is None:
        found = "names no eos_token" if token is None else f"names the eos_token {token!r}, which the tokenizer lacks"
        raise UserError(f"{folder}: tokenizer_config.json {found}: records need it to end their texts")
    return token, number


def generation_stops(source: Path, folder: Path) -> tuple[int, ...]:
    """Ids at which generation stops: `eos_token_id` of generation_config.json, else the tokenizer's eos token.

    `source`: where the user's tokenizer lies, perhaps beside a model; `folder`: the tokenizer as it is used.
    """
    path = source / GENERATION_CONFIG
    if path.is_file():
        try:
            found = json.loads(path.read_text("utf-8")).get("eos_token_id")
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON: {error}") from None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return (require_eos(folder, read_tokenizer(folder))[1],)
