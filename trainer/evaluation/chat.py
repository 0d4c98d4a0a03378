"""A conversation with a model: what was said, what of it fits the model's context, and the next answer, streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.generation.streamers import TextStreamer

from ...data_prep.errors import UserError
from .chat_format import ChatFormat, Message, opening
from .generation import Sampling, context_of, continued, end_tokens


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt."""

    prompt: str
    text: str
    tokens: int  # generated, the end token not counted
    ended: bool  # by an end token, not by the limit
    stopped: bool = False  # by an interrupt; `text` is what there was
    dropped: int = 0  # oldest exchanges that the context has no more room for, from this turn on


class Conversation:
    """Turns in order. When the context is full the oldest exchanges are dropped, and the answer says how many; the
    system prompt stays. A turn that does not fit even alone is refused.
    """

    def __init__(self, model: Any, chat: ChatFormat, sampling: Sampling, system: str | None = None) -> None:
        self.system = system
        self._model, self._chat, self._sampling = model, chat, sampling
        self._ends = [*dict.fromkeys([*end_tokens(model, chat.tokenizer), *chat.end_of_turn()])]
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system prompt; what is said next is as in a new conversation, draws included."""
        self.messages: list[Message] = []
        self._turns = 0

    def say(self, text: str, write: Callable[[str], None] = lambda text: None) -> Answer:
        """The answer to a user's turn; `write` gets it in pieces, as soon as words are whole.

        An interrupt (Ctrl-C) ends the answer where it is; what was said so far stays in the conversation.

        Raises:
            UserError: the turn does not fit the context, or the template refuses it; the conversation is as before.
        """
        turn = {"role": "user", "content": text}
        kept, ids = self._fitting(turn)
        dropped = (len(self.messages) - len(kept)) // 2
        stream = _Stream(self._chat.tokenizer, self._ends, write)
        sampling = replace(self._sampling, seed=self._sampling.seed + self._turns)  # no turn repeats another's draws
        stopped = False
        try:
            continued(self._model, [ids], self._ends, sampling, self._chat.tokenizer.pad_token_id, stream)
        except KeyboardInterrupt:
            stopped = True
            stream.end()
        new = [token for token in stream.ids if token not in self._ends]
        answer = self._chat.tokenizer.decode(new, skip_special_tokens=True)
        if stream.ids:
            self.messages = [*kept, turn, {"role": "assistant", "content": answer}]
            self._turns += 1
        return Answer(text, answer, len(new), len(new) < len(stream.ids), stopped, dropped)

    def _fitting(self, turn: Message) -> tuple[list[Message], list[int]]:
        """The newest exchanges that leave room for an answer, and the token ids of them and `turn`."""
        limit, room = context_of(self._model), self._sampling.max_new_tokens
        kept = self.messages
        while True:
            ids = self._chat.ids([*opening(self.system), *kept, turn])
            if limit is None or len(ids) + room <= limit:
                return kept, ids
            if not kept:
                raise UserError(
                    f"this turn has {len(ids)} tokens with the system prompt, and with --max-new-tokens {room} goes "
                    f"beyond the model's context of {limit}; shorten it or ask for at most "
                    f"{max(0, limit - len(ids))} new tokens"
                )
            kept = kept[2:]


class _Stream(TextStreamer):
    """Hands on text as soon as words are whole, without end tokens, and keeps the ids."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ids: list[int] = []
        self._ends, self._write = ends, write

    def put(self, value: Any) -> None:
        prompt = self.next_tokens_are_prompt
        if not prompt:
            self.ids += value.tolist()
        if prompt or self.ids[-1] not in self._ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)
