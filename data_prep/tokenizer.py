"""Tokenizers as files: makes the Hugging Face folder that a store carries, from the user's own or from the corpus."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
KEPT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Vocabulary:
    """What the rest of a preparation needs to know of a tokenizer."""

    size: int  # one more than the largest id, added tokens included
    eod_token: str
    eod_id: int


def adopt_tokenizer(source: Path, target: Path, eod_token: str | None) -> Vocabulary:
    """Copies a tokenizer to `target`: a Hugging Face folder, a tokenizer.json, or vocab.json with merges.txt."""
    if source.is_file():
        source = _folder_of(source)
        kept = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
    elif source.is_dir():
        kept = KEPT
    else:
        raise UserError(
            f"{source}: no such tokenizer: expected a Hugging Face folder, a tokenizer.json, or a folder with "
            "vocab.json and merges.txt, on this machine"
        )
    target.mkdir(parents=True)
    for name in kept:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (target / "tokenizer.json").exists():
        tokenizer = read_tokenizer(source)
    else:
        tokenizer = _from_vocabulary(source)
        tokenizer.save(str(target / "tokenizer.json"))
    token, number = end_of_document(source, tokenizer, eod_token)
    return _complete_folder(target, tokenizer, token, number)


def _folder_of(file: Path) -> Path:
    if file.name in ("tokenizer.json", "vocab.json", "merges.txt"):
        return file.parent
    raise UserError(f"{file}: not a tokenizer: expected a file named tokenizer.json, or a folder that holds one")


def _from_vocabulary(folder: Path) -> Tokenizer:
    """GPT-2's kind: a byte-level BPE given as vocab.json and merges.txt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.exists() and merges.exists()):
        raise UserError(f"{folder}: holds neither tokenizer.json nor vocab.json with merges.txt")
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:
        raise UserError(f"{folder}: vocab.json and merges.txt do not fit together: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, target: Path, eod_token: str | None) -> Vocabulary:
    """Trains a byte-level BPE of `vocab_size` tokens (257 at least), the end-of-document token included; saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eod_token or END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_batches(texts), trainer)
    target.mkdir(parents=True)
    tokenizer.save(str(target / "tokenizer.json"))
    return _complete_folder(target, tokenizer, *end_of_document(target, tokenizer, eod_token))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > 1 << 20:
            yield batch
            batch, size = [], 0
    yield batch


def _complete_folder(folder: Path, tokenizer: Tokenizer, token: str, number: int) -> Vocabulary:
    """Adds a tokenizer_config.json where there is none, so that `AutoTokenizer` loads the folder."""
    config = folder / "tokenizer_config.json"
    if not config.exists():
        content = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": token,
            "clean_up_tokenization_spaces": False,
        }
        config.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return Vocabulary(max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1, token, number)


def is_bare_vocabulary(folder: Path) -> bool:
    """Whether it holds a tokenizer as vocab.json and merges.txt only."""
    bare = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    return bare and not (folder / "tokenizer.json").is_file()


@contextmanager
def completed(folder: Path) -> Iterator[Path]:
    """A folder that Hugging Face's loaders take as it is: this one, or one made of its vocab.json and merges.txt."""
    if not is_bare_vocabulary(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        adopt_tokenizer(folder, Path(made) / "tokenizer", None)
        yield Path(made) / "tokenizer"


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, be it vocab.json and merges.txt alone. UserError if it cannot be read."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if is_bare_vocabulary(folder):
        return _from_vocabulary(folder)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer that Hugging Face tokenizers can read: {error}") from None


def end_of_document(folder: Path, tokenizer: Tokenizer, eod_token: str | None) -> tuple[str, int]:
    """The token that ends each document: the one asked for, else `<|endoftext|>`, else the tokenizer's eos token."""
    wanted = [eod_token] if eod_token else [END_OF_TEXT, eos_token(folder)]
    for token in wanted:
        if token is not None and (number := tokenizer.token_to_id(token)) is not None:
            return token, number
    special = [entry.content for entry in tokenizer.get_added_tokens_decoder().values()]
    missing = f"has no token {eod_token!r}" if eod_token else f"has neither {END_OF_TEXT!r} nor an eos token"
    raise UserError(
        f"{folder}: the tokenizer {missing}; name its end-of-document token with --eod-token"
        + (f", one of: {', '.join(map(repr, special[:20]))}" if special else "")
    )


def eos_token(folder: Path) -> str | None:
    """The end-of-sequence token that the folder's configuration names, if it names one."""
    return named_tokens(folder).get("eos_token")


def named_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like, as far as the folder's configuration names them."""
    config = tokenizer_config(folder)
    found = {name: config.get(name) for name in NAMED}
    contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: content for name, content in contents.items() if content is not None}


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says, or, where it is silent, special_tokens_map.json."""
    config: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            try:
                config = json.loads((folder / name).read_text("utf-8")) | config
            except ValueError as error:
                raise UserError(f"{folder / name}: not valid JSON: {error}") from None
    return config
