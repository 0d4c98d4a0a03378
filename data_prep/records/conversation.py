"""Conversations as chat templates take them: lists of messages, checked."""

from __future__ import annotations

from typing import Any

from ..corpus.documents import kind_of
from .settings import BadRecord

ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing, the one that templates read first
FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def conversation(value: Any, key: str) -> list[dict[str, Any]]:
    """The messages at a key, each with a known role and text; ShareGPT's `from` and `value` become role and content.

    Keys without a value are left out, and reasoning goes under the names that templates look for, both as
    transformers does it.
    """
    if not isinstance(value, list):
        raise BadRecord(f"the value of {key!r} is {kind_of(value)}, a list of messages was expected")
    if not value:
        raise BadRecord(f"{key!r} holds no message")
    return [_message(entry, f"{key}[{number}]") for number, entry in enumerate(value)]


def _message(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise BadRecord(f"{where} is {kind_of(entry)}, a message with role and content was expected")
    message = {name: value for name, value in entry.items() if value is not None}
    role = message.get("role")
    if role is None and "from" in message:
        role = message.pop("from")
        role = ALIASES.get(role, role) if isinstance(role, str) else role
        message["content"] = message.pop("value", None)
        message["role"] = role
    if role is None:
        raise BadRecord(f"{where} has no role; the keys there are: {', '.join(map(repr, entry)) or 'none'}")
    if not isinstance(role, str) or role not in FOLLOWS:
        raise BadRecord(f"{where}: unknown role {role!r}; known are system, user, assistant and tool")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        message.pop("content", None)
    elif not isinstance(content, str):
        _require_text_parts(content, where)
    if role == "assistant":
        _require_answer(message, where)
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _require_text_parts(content: Any, where: str) -> None:
    if not isinstance(content, list):
        raise BadRecord(f"{where}: its content is {kind_of(content)}, a string was expected")
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise BadRecord(f"{where}: only text can be learnt: a part of its content is not {{'type': 'text', …}}")


def _require_answer(message: dict[str, Any], where: str) -> None:
    if not message.get("tool_calls") and not any(text.strip() for text in texts_of(message)):
        raise BadRecord(f"{where}: the assistant's turn is empty")


def texts_of(message: dict[str, Any]) -> list[str]:
    """The strings of a message's content."""
    content = message.get("content", "")
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def require_order(messages: list[dict[str, Any]], key: str) -> None:
    """BadRecord unless the roles take turns: a system prompt or none, then user and assistant, tools between."""
    before = None
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in FOLLOWS[before]:
            after = f"after {before!r}" if before else "at the beginning"
            expected = " or ".join(map(repr, FOLLOWS[before]))
            raise BadRecord(f"{key}[{number}]: roles out of order: {role!r} {after}, expected {expected}")
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise BadRecord(f"{key}: no assistant turn, so there is nothing to learn")
