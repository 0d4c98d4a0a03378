"""Samples to texts, and in each text what is to be learnt: characters, or all after a prompt.

A conversation's answers are where the template marks them, or else where the text with an answer goes on from the
text without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .formats import Messages, Sample
from .settings import BadRecord, RecordJob
from .template import ChatTemplate, Span


@dataclass(frozen=True)
class Draft:
    """A text that is not encoded yet. What is learnt: `spans`, or what follows `prompt`, or all of it."""

    text: str
    spans: list[Span] | None = None
    exact: bool = False  # the spans are the template's own; else each ends after its last special token
    prompt: str | None = None  # learnt is what comes after the tokens that it has in common with the text
    added: bool = False  # with the tokens that the tokenizer puts around plain text, such as <s>

    @property
    def texts(self) -> list[str]:
        """What must be encoded: the text, and the prompt that it is compared with."""
        return [self.text] if self.prompt is None else [self.text, self.prompt]


class Drafter:
    """Makes drafts as a job wants them."""

    def __init__(self, job: RecordJob, eos: str, special: Sequence[str], template: Callable[[], ChatTemplate]) -> None:
        """`eos`: ends plain text; `special`: all special tokens; `template`: is asked for when a conversation comes."""
        self.job = job
        self.eos = eos
        self.special = special
        self._template = template

    def drafts(self, sample: Sample) -> list[Draft]:
        """The texts of a sample: one, or those of the chosen and the rejected answer. BadRecord if it has none."""
        if sample.prompt is not None:
            return [self._after_prompt(sample, answer) for answer in sample.answers]
        (answer,) = sample.answers
        if not sample.conversational:
            return [Draft(self._ended(answer), added=True)]
        return [self._conversation(answer, sample.tools, sample.extra)]

    def _ended(self, text: str) -> str:
        return text if text.endswith(self.eos) else text + self.eos

    def _after_prompt(self, sample: Sample, answer: Any) -> Draft:
        """As TRL tokenises a prompt and what follows it."""
        everything, prompt = self.job.train_on == "all", sample.prompt
        if not sample.conversational:
            return Draft(prompt + self._ended(answer), prompt=None if everything else prompt, added=True)
        template, messages = self._template(), prompt + answer
        text = template.render(messages, sample.tools, sample.extra)
        if everything:
            return Draft(text)
        if self.job.train_on == "last_assistant":
            prompt = messages[: _assistants(messages)[-1]]
        return Draft(text, prompt=template.render(prompt, sample.tools, sample.extra, prompt=True))

    def _conversation(self, messages: Messages, tools: list[Any] | None, extra: dict[str, Any]) -> Draft:
        template = self._template()
        only_last = self.job.train_on == "last_assistant"
        if self.job.train_on == "all":
            return Draft(template.render(messages, tools, extra))
        if not template.marks(tools):
            text = template.render(messages, tools, extra)
            return Draft(text, self._compared(text, messages, tools, extra, only_last))
        text, spans = template.render_marked(messages, tools, extra)
        if not spans:
            raise BadRecord("the chat template marks nothing of it with {% generation %}")
        return Draft(text, _joined(spans)[-1:] if only_last else spans, exact=True)

    def _compared(
        self, text: str, messages: Messages, tools: list[Any] | None, extra: dict[str, Any], only_last: bool
    ) -> list[Span]:
        """The assistant's turns in the text, each from the end of the prompt before it to where its turn ends."""
        template, spans = self._template(), []
        for turn in _assistants(messages)[-1:] if only_last else _assistants(messages):
            before = template.render(messages[:turn], tools, extra, prompt=True)
            last = turn == len(messages) - 1
            after = text if last else template.render(messages[: turn + 1], tools, extra)
            end = len(text) if last else self._end(after, text)
            if end is None or not text.startswith(before) or end < len(before):
                raise BadRecord(
                    f"the chat template writes what comes before or with turn {turn} in another way when more follows, "
                    "so that what is to be learnt cannot be found by comparison; give a template that marks it with "
                    "{% generation %} (--chat-template), or learn the last turn only (--train-on last_assistant)"
                )
            spans.append((len(before), end))
        return spans

    def _end(self, after: str, text: str) -> int | None:
        """Where the text up to a turn ends in the whole text, but for a token that ends every text."""
        if text.startswith(after):
            return len(after)
        for token in self.special:
            if after.endswith(token) and text.startswith(after[: -len(token)]):
                return len(after) - len(token)
        return None


def _assistants(messages: Messages) -> list[int]:
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _joined(spans: list[Span]) -> list[Span]:
    """Spans that touch made one."""
    joined: list[Span] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
