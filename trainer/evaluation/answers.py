"""Sample answers while a run trains: what the live engine says to the recipe's prompts, on any layout."""

from __future__ import annotations

from typing import Any

import torch

from ...data_prep.errors import UserError
from ..engine.base import Engine
from ..export.load import load_tokenizer
from ..metrics.record import RunLog
from ..run.data import RunData
from .chat_format import ChatFormat


class Answers:
    """Greedy answers to `eval.prompts`, written to the log. Each new token is one forward pass over all prompts."""

    def __init__(self, engine: Engine, data: RunData, log: RunLog) -> None:
        """Collective.

        Raises:
            UserError: on every rank: no tokenizer, or a prompt that leaves no room in a sample.
        """
        self.engine, self.log = engine, log
        self.prompts, self.tokens = engine.plan.recipe.eval.prompts, engine.plan.recipe.eval.answer_tokens
        self._rows: list[list[int]] = []
        if self.prompts:
            self._tokenizer, self._rows, self._ends = engine.ranks.together(lambda: self._prepare(data))

    def write(self, step: int) -> None:
        """Collective."""
        if not self._rows:
            return
        for prompt, row in zip(self.prompts, self._continued(), strict=True):
            answer = self._tokenizer.decode(row, skip_special_tokens=True).strip()
            self.log.event("answer", step, f"  {prompt!r} → {answer!r}", prompt=prompt, answer=answer)

    def _prepare(self, data: RunData) -> tuple[Any, list[list[int]], set[int]]:
        plan = self.engine.plan
        folder = plan.recipe.tokenizer or data.train[0].part.store.tokenizer
        tokenizer = load_tokenizer(folder) if folder else None
        if tokenizer is None:
            raise UserError(
                "eval.prompts: the data has no tokenizer; state the recipe's `tokenizer`, or leave them out"
            )
        ends = {token for samples in data.train for token in samples.part.store.stop_ids}
        stated = plan.model_config.get("eos_token_id")
        ends |= set(stated if isinstance(stated, list) else [] if stated is None else [stated])
        if data.train[0].part.store.kind != "text" and tokenizer.chat_template:
            chat = ChatFormat(tokenizer)
            rows = [chat.ids([{"role": "user", "content": prompt}]) for prompt in self.prompts]
        else:
            rows = [tokenizer(prompt)["input_ids"] for prompt in self.prompts]
        for prompt, row in zip(self.prompts, rows, strict=True):
            if not row or len(row) + self.tokens > plan.seq_len:
                raise UserError(
                    f"eval.prompts: {prompt!r} is {len(row)} tokens; 1 to {plan.seq_len - self.tokens} leave room for "
                    f"eval.answer_tokens {self.tokens} within data.seq_len {plan.seq_len}"
                )
        return tokenizer, rows, ends

    def _continued(self) -> list[list[int]]:
        """The new tokens after each prompt, up to the one that ends it."""
        rows, new, open_ = [list(row) for row in self._rows], [[] for _ in self._rows], set(range(len(self._rows)))
        for _ in range(self.tokens):
            width = max(map(len, rows))  # what pads a row comes after all that its next token depends on
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            logits = self.engine.logits(ids)
            for k in sorted(open_):
                token = int(logits[k, len(rows[k]) - 1].argmax())
                if token in self._ends:
                    open_.remove(k)
                else:
                    rows[k].append(token)
                    new[k].append(token)
            if not open_:
                break
        return new
