"""What a record is, told by its keys: a conversation, a prompt with a completion, a text, or a pair to choose from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..corpus.documents import key_paths, kind_of
from .conversation import conversation, require_order, texts_of
from .settings import BadRecord

Messages = list[dict[str, Any]]
KNOWN = {
    "sft": "messages | conversations (ShareGPT) | prompt + completion | instruction + output (Alpaca) | text",
    "dpo": "chosen + rejected, with or without prompt",
}
RESERVED = ("messages", "tools", "add_generation_prompt")  # what chat_template_kwargs may not name


@dataclass(frozen=True)
class Sample:
    """A record in one shape: an answer, or the chosen and the rejected one, after a prompt or whole in itself.

    All of them are text, or all of them messages.
    """

    format: str
    answers: list[Any]  # str or Messages
    prompt: Any = None  # None: the answer is whole, and what is learnt in it is told by its roles
    tools: list[Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further variables of the chat template

    @property
    def conversational(self) -> bool:
        """Whether its answers are messages, which a chat template renders; else they are text as it is."""
        return isinstance(self.answers[0], list)

    def contents(self) -> list[str]:
        """The strings that the user wrote."""
        values = self.answers if self.prompt is None else [self.prompt, *self.answers]
        if not self.conversational:
            return values
        return [text for messages in values for message in messages for text in texts_of(message)]


def recognise(record: dict[str, Any], kind: str) -> Sample:
    """The sample in a record. BadRecord if it is of no known format, or not of that kind (sft, dpo, auto: either)."""
    record = {key: value for key, value in record.items() if value is not None}
    pair = "chosen" in record and "rejected" in record
    if pair and kind != "sft":
        return _pair(record)
    if kind != "dpo":
        for keys, read in _SFT:
            if all(key in record for key in keys):
                return read(record)
    known = " | ".join(KNOWN.values()) if kind == "auto" else KNOWN[kind]
    keys = ", ".join(map(repr, key_paths(record))) or "none"
    raise BadRecord(f"of no known format: the keys there are: {keys}; expected: {known}")


def _messages(record: dict[str, Any]) -> Sample:
    return _conversation(record, "messages", "messages", [])


def _sharegpt(record: dict[str, Any]) -> Sample:
    return _conversation(record, "ShareGPT", "conversations", _system(record))


def _conversation(record: dict[str, Any], format: str, key: str, system: Messages) -> Sample:
    messages = system + conversation(record[key], key)
    require_order(messages, key)
    return Sample(format, [messages], None, *_template_values(record))


def _alpaca(record: dict[str, Any]) -> Sample:
    instruction, given, output = (_text(record, key) for key in ("instruction", "input", "output"))
    turns = []
    for entry in record.get("history", []):
        if not (isinstance(entry, list) and len(entry) == 2):
            raise BadRecord("'history' must hold pairs of an instruction and its answer")
        turns += [{"role": "user", "content": entry[0]}, {"role": "assistant", "content": entry[1]}]
    turns.append({"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction})
    turns.append({"role": "assistant", "content": output})
    messages = _system(record) + conversation(turns, "instruction and output")
    require_order(messages, "instruction and output")
    return Sample("Alpaca", [messages], None, *_template_values(record))


def _system(record: dict[str, Any]) -> Messages:
    text = _text(record, "system")
    return [{"role": "system", "content": text}] if text else []


def _completion(record: dict[str, Any]) -> Sample:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        prompt, completion = conversation(prompt, "prompt"), conversation(completion, "completion")
        _require_answers(prompt, completion, "completion")
    else:
        prompt, completion = _text(record, "prompt"), _require_text(record, "completion")
    return Sample("prompt/completion", [completion], prompt, *_template_values(record))


def _plain(record: dict[str, Any]) -> Sample:
    return Sample("text", [_require_text(record, "text")])


_SFT: list[tuple[tuple[str, ...], Callable[[dict[str, Any]], Sample]]] = [
    (("messages",), _messages),
    (("conversations",), _sharegpt),
    (("prompt", "completion"), _completion),
    (("instruction", "output"), _alpaca),
    (("text",), _plain),
]


def _pair(record: dict[str, Any]) -> Sample:
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if chosen == rejected:
        raise BadRecord("chosen and rejected are equal: there is nothing to prefer")
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = conversation(chosen, "chosen"), conversation(rejected, "rejected")
        prompt, chosen, rejected = _conversational_pair(prompt, chosen, rejected)
        if chosen == rejected:
            raise BadRecord("chosen and rejected are equal: there is nothing to prefer")
        _require_answers(prompt, chosen, "chosen")
        _require_answers(prompt, rejected, "rejected")
    else:
        chosen, rejected = _require_text(record, "chosen"), _require_text(record, "rejected")
        if prompt is None:
            prompt, chosen, rejected = shared_prompt(chosen, rejected)
        elif not isinstance(prompt, str):
            raise BadRecord(f"'prompt' is {kind_of(prompt)}, but 'chosen' is a string: both must be text or messages")
        if not prompt:
            raise BadRecord("chosen and rejected share no beginning that could be the prompt, and no 'prompt' is there")
    return Sample("pairs", [chosen, rejected], prompt, *_template_values(record))


def _conversational_pair(prompt: Any, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """A prompt that is text is the user's turn: it may stand before the answers or be the first turn of both."""
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return conversation([{"role": "user", "content": prompt}], "prompt"), chosen, rejected
    if isinstance(prompt, str) and not all(
        any(message["role"] == "user" and message.get("content") == prompt for message in messages)
        for messages in (chosen, rejected)
    ):
        raise BadRecord("'prompt' is text that is no turn of both 'chosen' and 'rejected': give it as messages")
    if prompt is None or isinstance(prompt, str):
        return shared_prompt(chosen, rejected)
    return conversation(prompt, "prompt"), chosen, rejected


def shared_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The beginning that two texts, or two conversations, share, and what is left of each.

    As TRL cuts them: a space before the difference belongs to the answers, and so does the last thing of the
    shorter if it is a beginning of the longer.
    """
    shorter = min(len(chosen), len(rejected))
    cut = next((place for place in range(shorter) if chosen[place] != rejected[place]), None)
    if cut is None:
        cut = shorter - 1
    elif cut and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _require_answers(prompt: Messages, answer: Messages, key: str) -> None:
    if answer[0]["role"] != "assistant":
        raise BadRecord(f"{key!r} begins with the role {answer[0]['role']!r}, an assistant turn was expected")
    if not prompt:
        raise BadRecord(f"no message before {key!r}: it has no prompt")
    require_order(prompt + answer, f"prompt + {key}")


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key, "")
    if not isinstance(value, str):
        raise BadRecord(f"the value of {key!r} is {kind_of(value)}, a string was expected")
    return value


def _require_text(record: dict[str, Any], key: str) -> str:
    text = _text(record, key)
    if not text:
        raise BadRecord(f"the value of {key!r} is empty")
    return text


def _template_values(record: dict[str, Any]) -> tuple[list[Any] | None, dict[str, Any]]:
    """`tools`, which may be written as JSON in a string, and `chat_template_kwargs`."""
    tools, extra = record.get("tools"), record.get("chat_template_kwargs", {})
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRecord(f"'tools' is a string that is not JSON: {error}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRecord("'tools' must be a list of JSON schemas")
    if not isinstance(extra, dict) or any(name in extra for name in RESERVED):
        raise BadRecord(f"'chat_template_kwargs' must be an object that names none of {', '.join(RESERVED)}")
    return tools or None, extra
