"""A tiny model that has learned a few dialogues by heart, with a ChatML tokenizer: what tests of chat share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.tiny import LLAMA
from tests.unit.trainer.runs import fresh_model

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DIALOGUES = [
    ("What is red?", "A colour, like blue.\nAnd warm.", "And two?", "A number."),
    ("What is two?", "A number, like three.", "And red?", "A colour."),
]
SYSTEM = "Be kind."
CONTEXT = 128


def learned_folder(folder: Path) -> Path:
    """A Hugging Face folder; its own end token is <|endoftext|>, which is not what ends a turn of its template."""
    tokenizer = chat_tokenizer()
    config = {**LLAMA, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "eos_token_id": 0}
    model = fresh_model(config, seed=5).train()
    rows = []
    for dialogue in DIALOGUES:
        turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(dialogue)]
        for start in ([], [{"role": "system", "content": SYSTEM}]):
            rows.append(tokenizer.apply_chat_template(start + turns, tokenize=True, return_dict=False))
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(120):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_tokenizer(*special: str) -> Any:
    """A byte-level BPE with the special tokens of ChatML, and others."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320 + len(special), special_tokens=tokens, initial_alphabet=alphabet)
    inner.train_from_iterator([*(text for dialogue in DIALOGUES for text in dialogue), "user", "assistant"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=tokens[0], eos_token=tokens[0], chat_template=CHATML
    )


def lines_of_json(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]
