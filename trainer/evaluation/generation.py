"""Text from a trained model: greedy or sampled, several prompts at once, the same text for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...data_prep.errors import UserError
from .chat_format import ChatFormat, opening


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 leave all tokens in the draw."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        checks = (
            (self.temperature >= 0, "--temperature", self.temperature, "0 (greedy) or more"),
            (self.top_k >= 0, "--top-k", self.top_k, "0 (all tokens) or more"),
            (0 < self.top_p <= 1, "--top-p", self.top_p, "more than 0, up to 1"),
            (self.max_new_tokens > 0, "--max-new-tokens", self.max_new_tokens, "1 or more"),
            (self.seed >= 0, "--seed", self.seed, "0 or more"),
        )
        for fine, option, value, expected in checks:
            if not fine:
                raise UserError(f"{option} {value}: expected {expected}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise UserError("--top-k and --top-p choose among drawn tokens: add --temperature, e.g. --temperature 1")

    def arguments(self) -> dict[str, Any]:
        """For transformers' `generate`."""
        if self.temperature == 0:
            # stated, so that a folder's generation_config.json cannot bring sampling settings back in
            return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


@dataclass(frozen=True)
class Generated:
    """What the model wrote after one prompt."""

    prompt: str
    text: str  # the continuation
    tokens: int  # generated, the end-of-text token not counted
    ended: bool  # by the model's end-of-text token, not by the limit


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    chat: ChatFormat | None = None,
    system: str | None = None,
) -> list[Generated]:
    """Continues every prompt, all in one batch, in the given order.

    Prompts are padded on the left and the padding is masked, so that each is continued as if it stood alone (to the
    rounding of the arithmetic). An empty prompt starts from the end-of-text token, as a document does in training.

    Args:
        chat: each prompt is a user's turn of a conversation of its own, and its continuation the answer.
        system: the system prompt of these conversations.

    Raises:
        UserError: no tokenizer, no prompt, or a prompt that leaves no room in the model's context.
    """
    if tokenizer is None:
        raise UserError("there is no tokenizer with this model; name the folder of one with --tokenizer")
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT (several times, if you like) or --prompt-file FILE")
    end = end_tokens(model, tokenizer)
    if chat is None:
        rows = [_encode(tokenizer, prompt, end) for prompt in prompts]
    else:
        rows = [chat.ids([*opening(system), {"role": "user", "content": prompt}]) for prompt in prompts]
        end = [*dict.fromkeys([*end, *chat.end_of_turn()])]
    check_room(rows, model, sampling.max_new_tokens)
    new = continued(model, rows, end, sampling, tokenizer.pad_token_id)
    return [_decoded(tokenizer, prompt, row, end) for prompt, row in zip(prompts, new, strict=True)]


def continued(
    model: Any,
    rows: Sequence[Sequence[int]],
    end: Sequence[int],
    sampling: Sampling,
    pad: int | None,
    streamer: Any = None,
) -> list[list[int]]:
    """The new token ids after each row, an end token and padding after it included.

    Args:
        pad: id to pad with, if there is one of its own; it is masked, so any would do.
        streamer: transformers' kind, which is handed every token as it comes; for one row only.
    """
    width = max(map(len, rows))
    pad = pad if pad is not None else (end or [0])[0]
    ids = torch.tensor([[pad] * (width - len(row)) + [*row] for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    torch.manual_seed(sampling.seed)  # of the device as well; `generate` draws from the global generator
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=list(end) or None,
            use_cache=True,
            streamer=streamer,
            **sampling.arguments(),
        )
    return output[:, width:].tolist()


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text: the model's, else the tokenizer's."""
    stated = model.generation_config.eos_token_id
    if stated is None:
        stated = model.config.eos_token_id if model.config.eos_token_id is not None else tokenizer.eos_token_id
    if stated is None:
        return []
    return list(stated) if isinstance(stated, list) else [stated]


def _encode(tokenizer: Any, prompt: str, end: Sequence[int]) -> list[int]:
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    if not ids and not end:
        raise UserError("an empty prompt needs a model with an end-of-text token to start from")
    return ids or [end[0]]


def context_of(model: Any) -> int | None:
    """Positions that the model knows; None where its configuration names no limit."""
    return getattr(model.config, "max_position_embeddings", None)


def check_room(rows: Sequence[Sequence[int]], model: Any, new_tokens: int) -> None:
    """Refuses what would run beyond the positions that the model knows."""
    limit = context_of(model)
    longest = max(map(len, rows))
    if limit is not None and longest + new_tokens > limit:
        raise UserError(
            f"the longest prompt has {longest} tokens, and with --max-new-tokens {new_tokens} goes beyond the model's "
            f"context of {limit}; shorten the prompt or ask for at most {max(0, limit - longest)} new tokens"
        )


def _decoded(tokenizer: Any, prompt: str, row: list[int], end: Sequence[int]) -> Generated:
    stop = next((place for place, token in enumerate(row) if token in end), None)
    kept = row if stop is None else row[:stop]
    return Generated(prompt, tokenizer.decode(kept, skip_special_tokens=True), len(kept), stop is not None)
