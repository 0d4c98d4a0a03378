"""Chat templates, rendered as transformers renders them, without importing it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..errors import UserError
from ..tokenizer import named_tokens, tokenizer_config
from .settings import BadRecord

TEMPLATE_FILE = "chat_template.jinja"
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]  # characters [start, stop) of a rendered text


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}` around what the model writes. Notes where that begins and ends."""

    tags = {"generation"}  # noqa: RUF012, jinja2's own protocol

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(generation=self)
        self.written = 0  # characters of the text so far
        self.spans: list[Span] | None = None

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        if self.spans is not None:
            self.spans.append((self.written, self.written + len(text)))
        return text

    @contextmanager
    def noting(self) -> Iterator[list[Span]]:
        """The spans of what the model writes, in characters of the text that is rendered inside."""
        self.written, self.spans = 0, []
        try:
            yield self.spans
        finally:
            self.spans = None


class _Namespace(Namespace):
    """Holds no attribute that begins with an underscore: templates come from others."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        own, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(own, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} of a namespace")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """Compiled once; its variables are the tokenizer's named tokens, and the date is a given one."""

    def __init__(self, sources: dict[str, str], tokens: dict[str, str], today: str | None) -> None:
        """`sources`: the template as "default" and perhaps one for conversations with tools, "tool_use"."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise,
            "dict": _make_dict,
            "namespace": _Namespace,
        }
        if today is not None:
            environment.globals["strftime_now"] = date.fromisoformat(today).strftime
        self._generation: Generation = environment.generation  # type: ignore[attr-defined]
        self._marked = {name: bool(MARKER.search(source)) for name, source in sources.items()}
        self._tokens = tokens
        try:
            self._compiled = {name: environment.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is no valid jinja2 template: {error}") from None

    def marks(self, tools: list[Any] | None) -> bool:
        """Whether it says itself, with `{% generation %}`, what the model writes."""
        return self._marked[self._name(tools)]

    def render(self, messages: list[Any], tools: list[Any] | None, extra: dict[str, Any], prompt: bool = False) -> str:
        """The text of a conversation; `prompt`: with what invites the next answer. BadRecord if the template fails."""
        return "".join(self._pieces(messages, tools, extra, prompt))

    def render_marked(
        self, messages: list[Any], tools: list[Any] | None, extra: dict[str, Any]
    ) -> tuple[str, list[Span]]:
        """The text, and the spans that the template marks."""
        pieces = []
        with self._generation.noting() as spans:
            for piece in self._pieces(messages, tools, extra, False):
                pieces.append(piece)
                self._generation.written += len(piece)
        return "".join(pieces), spans

    def _pieces(
        self, messages: list[Any], tools: list[Any] | None, extra: dict[str, Any], prompt: bool
    ) -> Iterator[str]:
        values = {"documents": None, **self._tokens, **extra}
        values |= {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
        try:
            yield from self._compiled[self._name(tools)].generate(values)
        except Exception as error:  # a template is a program: it may raise anything
            raise BadRecord(f"the chat template fails on it: {error}") from None

    def _name(self, tools: list[Any] | None) -> str:
        return "tool_use" if tools and "tool_use" in self._compiled else "default"


def template_sources(folder: Path) -> dict[str, str]:
    """The chat templates of a tokenizer's folder by name; empty if it has none."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return {"default": path.read_text("utf-8")}
    found = tokenizer_config(folder).get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    named = {entry["name"]: entry["template"] for entry in found or []}
    return named if "default" in named else {}


def read_template(folder: Path, today: str | None) -> ChatTemplate:
    """The chat template of a tokenizer's folder. UserError if it has none, or one that does not compile."""
    sources = template_sources(folder)
    if not sources:
        raise UserError(
            "the records are conversations, but the tokenizer has no chat template: give one with --chat-template FILE"
        )
    return ChatTemplate(sources, named_tokens(folder), today)


def template_digest(folder: Path) -> str | None:
    """SHA-256 of the templates of a folder; None if it has none."""
    sources = template_sources(folder)
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest() if sources else None


def uses_date(sources: dict[str, str]) -> bool:
    """Whether a template asks for the date, so that what it renders changes from day to day."""
    return any("strftime_now" in source for source in sources.values())
