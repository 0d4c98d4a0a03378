"""How a chat template writes a conversation as token ids, and by which token it ends an assistant's turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from ...data_prep.errors import UserError

Message = dict[str, str]  # role and content

_PROBE = "zeropipe"  # a word that templates have no reason to change


class ChatFormat:
    """A tokenizer with the chat template that is used with it."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        """Args: `template` in Jinja, in place of the tokenizer's own.

        Raises:
            UserError: no tokenizer, or no template.
        """
        if tokenizer is None:
            raise UserError("there is no tokenizer with this model; name the folder of one with --tokenizer")
        if template is None and not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template, so there is no telling how this model wants a conversation "
                "written; give one with --chat-template FILE, or use `zeropipe generate --prompt` for plain text"
            )
        self.tokenizer, self._template = tokenizer, template

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """A conversation, up to where the assistant's next answer begins.

        Raises:
            UserError: the template refuses it, or fails.
        """
        return self._apply(messages, add_generation_prompt=True, tokenize=True, return_dict=False)

    def end_of_turn(self) -> list[int]:
        """Id of the special token that follows an assistant's answer; empty where plain text, or nothing, follows."""
        dialogue = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        text = self._apply(dialogue, tokenize=False)
        if _PROBE not in text:
            raise UserError("the chat template leaves out what the assistant says; give another with --chat-template")
        after = self.tokenizer(text.rpartition(_PROBE)[2], add_special_tokens=False)["input_ids"]
        special = self.tokenizer.added_tokens_decoder
        return next(([token] for token in after if token in special), [])

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), chat_template=self._template, **options)
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template fails on a conversation of {roles}: {error}") from None


def opening(system: str | None) -> list[Message]:
    """What a conversation begins with; nothing where no system prompt is stated, which leaves it to the template."""
    return [] if system is None else [{"role": "system", "content": system}]
