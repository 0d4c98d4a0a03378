"""`datasets` and what belongs to them: the `zeropipe prepare` commands, and the recipe's `data`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .reasons import DATASET_REASONS
from .stated import Stated

STANDARD_ROLES = {"user": {"human", "user"}, "assistant": {"gpt", "model", "assistant"}, "system": {"system"}}
_FAMILIES = ("chat_template", "sharegpt", "alpaca", "completion", "pretrain")
_KEYS = {
    "sft": "messages, conversations, prompt and completion, instruction and output, or text",
    "dpo": "prompt, chosen and rejected",
    "text": "text",
}
KNOWN_MAPPINGS = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})
_TEMPLATE = "chat_template.jinja"
_EXCESS = {"drop": "drop", "truncate": "truncate", "raise": "error"}


@dataclass
class Sources:
    """What an Axolotl file's data sets come to here."""

    kind: str  # sft, dpo or text
    commands: list[list[str]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)  # its `data`
    files: dict[str, str] = field(default_factory=dict)  # that the commands name, to be written into the output


def read_data(stated: Stated, kind: str | None, name: str, output: Path) -> Sources:
    """Args: `kind`: dpo where the objective says so; None: told by the data sets' types."""
    entries = [*stated.sections("datasets"), *stated.sections("pretraining_dataset")]
    held_out = stated.sections("test_datasets")
    if not entries:
        raise stated.error("datasets", "missing: there is nothing to train on")
    held = [*entries, *held_out]
    types = [_type(entry) for entry in held]
    if kind is None:
        kind = "text" if all(known in ("completion", "pretrain") for known in types) else "sft"
    for entry, known in zip(held, types, strict=True):
        _records(entry, known, kind)
    sources = Sources(kind)
    length = stated.whole("sequence_len", 512)
    if kind == "dpo":
        stated.change("sequence_len", f"of each of the two answers; data.seq_len is of the pair, so {2 * length}")
        length *= 2
    sources.recipe = {"train": [{"store": f"data/{name}"}], "seq_len": length}
    options = _options(stated, held, length, sources, output)
    sources.commands.append(_prepare(stated, entries, kind, f"data/{name}", options))
    _hold_out(stated, held_out, sources, f"data/{name}-valid", options)
    packs = stated.flag("sample_packing")
    if kind != "text":
        sources.recipe["packing"] = "best_fit" if packs else "none"
    elif not packs and "sample_packing" in stated:
        stated.change("sample_packing", "text is always packed: samples are cut from one stream of documents")
    return sources


def _type(entry: Stated) -> str:
    """chat_template, alpaca, chatml.intel, …"""
    stated = entry.get("type", "pretrain" if entry.home == "pretraining_dataset" else "tokenised")
    return "custom" if isinstance(stated, dict) else str(stated).replace(":", ".")


def _records(entry: Stated, stated: str, kind: str) -> None:
    """What is otherwise than the type says; `prepare` tells records by their keys."""
    family, _, variant = stated.partition(".")
    if family == "custom":
        entry.change("type", f"a format of its own; the keys of records have to be {_KEYS[kind]}")
    elif family == "tokenised":
        entry.change("path", f"no type: Axolotl takes tokens there, prepare takes records, with {_KEYS[kind]}")
    elif kind == "dpo":
        if variant not in ("prompt_pairs", "ultra", "argilla_chat", ""):
            entry.change("type", f"{stated}: the keys of records have to be {_KEYS[kind]}; rename or regroup others")
        if family != "chat_template":
            entry.change("type", f"{stated}: the tokenizer's chat template, unless --chat-template names another")
    elif family == "alpaca":
        entry.change("type", "the instruction becomes a user's turn of the chat template, not Alpaca's own wording")
    elif family not in _FAMILIES:
        entry.change("type", f"{stated} is not known here; the keys of records have to be {_KEYS[kind]}")


def _options(stated: Stated, entries: list[Stated], length: int, sources: Sources, output: Path) -> list[str]:
    """Options of `prepare` that hold for all data sets."""
    if sources.kind == "text":
        keys = dict.fromkeys(entry.text("field") or entry.text("text_column") or "text" for entry in entries)
        if len(keys) > 1:
            raise entries[-1].error("field", f"data sets of text keep it under one key, here {', '.join(keys)}")
        for section in (stated, *entries):
            for key in ("chat_template", "chat_template_jinja", "train_on_inputs", "excess_length_strategy"):
                section.leave(key, "text has no turns, and all of it is trained")
        return [] if list(keys) == ["text"] else ["--text-key", *keys]
    options = ["--seq-len", str(length)]
    excess = stated.text("excess_length_strategy", "drop")
    if excess not in _EXCESS:
        raise stated.error("excess_length_strategy", f"must be one of {', '.join(_EXCESS)}")
    if excess != "drop":
        options += ["--excess", _EXCESS[excess]]
    inputs = stated.flag("train_on_inputs")
    if sources.kind == "sft":
        roles = [_trained(entry) for entry in entries]
        if inputs or "all" in roles:
            options += ["--train-on", "all"]
        if len(set(roles)) > 1:
            entries[0].change("roles_to_train", "one way for all data sets: --train-on all")
    templates = [_template(section, sources, output) for section in (stated, *entries)]
    if chosen := next(filter(None, templates), None):
        options += ["--chat-template", chosen]
    return options


def _trained(entry: Stated) -> str:
    roles, ends = set(entry.names("roles_to_train")), entry.get("train_on_eos", "turn")
    if ends not in ("turn", "last"):
        entry.leave("train_on_eos", "the end of every trained turn is trained, of others never")
    elif ends == "last":
        entry.leave("train_on_eos", "the end of every trained turn is trained, not of the last alone")
    if not roles - {"assistant", "gpt"}:
        return "assistant"
    entry.change("roles_to_train", "all turns are trained; there are --train-on assistant, last_assistant and all")
    return "all"


def _template(section: Stated, sources: Sources, output: Path) -> str | None:
    """A file with a chat template; None: the tokenizer's own."""
    own = section.get("chat_template_jinja")
    named = section.get("chat_template", "tokenizer_default")
    if own is not None and Path(str(own)).is_file():
        return str(own)
    if own is not None:
        sources.files[_TEMPLATE] = str(own)
        return str(output / _TEMPLATE)
    if named.startswith("tokenizer_default_fallback_"):
        section.leave("chat_template", "the tokenizer's own; if it has none, prepare says so")
    elif named not in ("tokenizer_default", "jinja"):
        section.leave("chat_template", f"the tokenizer's own is used; give {named}'s with --chat-template FILE")
    return None


def _prepare(stated: Stated, entries: list[Stated], kind: str, store: str, options: list[str]) -> list[str]:
    tokenizer = str(stated.text("tokenizer_config") or stated.text("base_model"))
    inputs = [path for entry in entries for path in _inputs(entry)]
    for entry in entries:
        _keys(entry, kind)
        entry.leave_rest(DATASET_REASONS, "unknown to this import")
    form = [] if kind == "text" else ["--format", kind]
    return ["zeropipe", "prepare", *form, "--input", *inputs, "--tokenizer", tokenizer, "--output", store, *options]


def _inputs(entry: Stated) -> list[str]:
    path, files = entry.text("path", ""), entry.names("data_files")
    if not path and not files:
        raise entry.error("path", "missing")
    reader = path in ("", "json", "parquet", "csv", "text", "arrow")  # datasets' names for kinds of files
    inputs = [file if reader else str(Path(path) / file) for file in files] or [path]
    if absent := [name for name in inputs if not Path(name).exists() and not any(c in name for c in "*?[")]:
        entry.change("path", f"not on this machine: {', '.join(absent)}; save it as jsonl or parquet and give its path")
    split = entry.text("split", "train")
    if split != "train":
        entry.leave("split", "files are read whole; save that part as a file of its own")
    return inputs


def _keys(entry: Stated, kind: str) -> None:
    """Where records keep what: prepare knows the usual names only."""
    usual = {
        "field_messages": ("messages", "conversations"),
        "field_chosen": ("chosen",),
        "field_rejected": ("rejected",),
    }
    if kind == "sft":
        usual["field"] = ("text",)
    for key, names in usual.items():
        if entry.get(key, names[0]) not in names:
            entry.leave(key, f"rename that key of the records to {names[0]}")
    if entry.get("message_property_mappings", KNOWN_MAPPINGS[0]) not in KNOWN_MAPPINGS:
        entry.leave("message_property_mappings", "messages have role and content, or from and value")
    old = {"role": entry.get("message_field_role"), "content": entry.get("message_field_content")}
    if any(old.values()) and old not in KNOWN_MAPPINGS:
        for key in ("message_field_role", "message_field_content"):
            entry.leave(key, "messages have role and content, or from and value")
    roles = entry.get("roles", {})
    if not isinstance(roles, dict):
        raise entry.error("roles", "must be a mapping of roles to lists of names")
    if any(set(names) - STANDARD_ROLES.get(role, {role}) for role, names in roles.items()):
        entry.leave("roles", "known are user or human, assistant, gpt or model, system and tool; rename others")


def _hold_out(stated: Stated, entries: list[Stated], sources: Sources, store: str, options: list[str]) -> None:
    share = stated.number("val_set_size", 0.0)
    if entries:
        sources.commands.append(_prepare(stated, entries, sources.kind, store, options))
        sources.recipe["valid"] = [{"store": store}]
        if share:
            stated.leave("val_set_size", "test_datasets are held out")
    elif 0 < share < 1:
        sources.recipe["split"] = f"{round(1 - share, 6):g},{share:g}"
    else:
        sources.recipe["split"] = "1"
        if share:
            stated.leave("val_set_size", "a share is stated here, not a number of records: data.split, such as '95,5'")
