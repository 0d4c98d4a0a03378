"""Real records, their stores, and what transformers alone says of them: for tests with a real model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeropipe.data_prep.cli import main

LONGEST = 400  # places of a row: the longest dialogue takes 370, the longest pair 388


@dataclass(frozen=True)
class Material:
    """Model, records and stores. The records of a store are those of the lines of its file, in their order."""

    folder: Path
    stores: dict[str, Path]  # sft-train, sft-valid, dpo-train, dpo-valid

    @property
    def model(self) -> Path:
        return self.folder / "smollm2"

    def dialogues(self, split: str) -> list[list[dict[str, str]]]:
        lines = (self.folder / "dialogues" / f"{split}.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line)["messages"] for line in lines]


def prepared_store(kind: str, records: Path, tokenizer: Path, output: Path, *options: str) -> Path:
    words = ["--format", kind, "--input", str(records), "--tokenizer", str(tokenizer), "--output", str(output)]
    assert main(["prepare", *words, "--workers", "0", "--quiet", *options]) == 0
    return output


def learnt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and 1 where one is to be learnt: the answers and the token that ends each.

    By rendering the turns before each answer and up to it, which its template allows: turns do not change later.
    """

    def ids(turns: Sequence[dict[str, str]], asks: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(list(turns), add_generation_prompt=asks, return_dict=False)

    whole = ids(messages)
    mask = [0] * len(whole)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            first, last = len(ids(messages[:turn], True)), len(ids(messages[: turn + 1])) - 1  # a line feed comes last
            mask[first:last] = [1] * (last - first)
    return whole, mask
