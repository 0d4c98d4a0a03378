from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tests.unit.data_prep.samples import expected_tokens, nasty_texts, stdlib_texts
from zeropipe.data_prep.making import encoding
from zeropipe.data_prep.making.encoding import EncodersDiffer, Fast, Reference, make_encoder
from zeropipe.data_prep.tokenizer import adopt_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def assert_same(encoder: Fast | Reference, folder: Path, texts: list[str]) -> None:
    rows = encoder.encode([text.encode() for text in texts])
    for text, row, expected in zip(texts, rows, expected_tokens(folder, texts), strict=True):
        assert row.tolist() == expected[:-1], repr(text[:80])


@pytest.mark.parametrize("name", ["gigatoken", "tokenizers"])
def test_both_encoders_give_what_hugging_face_gives(tokenizer: Path, name: str) -> None:
    encoder = make_encoder(name, tokenizer, 10**12)
    texts = [*nasty_texts(), *stdlib_texts(10)]
    assert_same(encoder, tokenizer, texts)
    short = [text[:50] for text in texts if text[:50]]  # the way for many short documents
    assert_same(encoder, tokenizer, short)


def test_special_tokens_in_text_are_text(tokenizer: Path) -> None:
    end = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id("<|endoftext|>")
    for name in ("gigatoken", "tokenizers"):
        (row,) = make_encoder(name, tokenizer, 10**12).encode([b"a<|endoftext|>b"])
        assert end not in row and len(row) > 4


def trained(folder: Path, split: str, special: list[str]) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(stdlib_texts(10), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_another_family_with_a_begin_token_of_its_own(tmp_path: Path) -> None:
    """Llama 3's way of splitting, and a post-processor that would put <s> before every text."""
    folder = trained(tmp_path / "llama", LLAMA3, ["<s>", "<|endoftext|>"])
    encoder = make_encoder("gigatoken", folder, 10**12)
    assert_same(encoder, folder, [*nasty_texts(), *stdlib_texts(5)])


def test_a_tokenizer_that_gigatoken_does_not_support(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "<|endoftext|>": 1, "hello": 2, "world": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(EncodersDiffer, match="does not support") as refused:
        make_encoder("gigatoken", tmp_path, 10**12)
    assert "WordLevel" in str(refused.value) and "\n" not in str(refused.value)
    (row,) = make_encoder("tokenizers", tmp_path, 10**12).encode([b"hello new world"])
    assert row.tolist() == [2, 0, 3]


def encode_often(encoder: Fast | Reference, documents: list[bytes]) -> None:
    for _ in range(10):
        encoder.encode(documents)


class Lying:
    """A fast tokenizer that goes wrong after a while."""

    def __init__(self, real, right: int) -> None:
        self.real, self.right = real, right

    def encode(self, text: bytes) -> np.ndarray:
        self.right -= len(text)
        row = self.real.encode(text)
        return row if self.right > 0 else row[:-1]


def test_a_difference_is_seen_at_the_first_check_or_a_later_one(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "CHECK_BYTES", 100_000)
    documents = [text.encode() for text in stdlib_texts(10)]
    for right in (0, 400_000):
        encoder = make_encoder("gigatoken", tokenizer, 10**12)
        encoder._tokenizer = Lying(encoder._tokenizer, right)
        with pytest.raises(EncodersDiffer, match="differ on"):
            encode_often(encoder, documents)
        assert encoder._tokenizer.right > right - 2_000_000


ENDLESS_WORDS = """
import sys, numpy as np
from pathlib import Path
from zeropipe.data_prep.making import encoding
encoding.CHECK_BYTES = 1 << 20
encoder = encoding.make_encoder("gigatoken", Path(sys.argv[1]), int(sys.argv[2]))
encoder.encode([b"warm up"])
start = peak = encoding.resident_memory()
random = np.random.default_rng(0)
for _ in range(40):
    letters = random.integers(97, 123, 1 << 20, dtype=np.uint8)
    letters[random.random(len(letters)) < 0.12] = 32
    encoder.encode([letters.tobytes()])
    peak = max(peak, encoding.resident_memory())
print(peak - start)
"""


def test_caches_are_emptied_at_the_limit(tokenizer: Path) -> None:
    """New words without end: the caches of gigatoken 0.10.0 grow with them, by half a gigabyte here."""
    grown = [
        int(subprocess.check_output([sys.executable, "-c", ENDLESS_WORDS, str(tokenizer), str(allowed)], timeout=120))
        for allowed in (60_000_000, 10**12)
    ]
    assert grown[0] < 200_000_000 < grown[1]


@pytest.fixture
def gpt2_style(tokenizer: Path, tmp_path: Path) -> Path:
    """vocab.json and merges.txt, as GPT-2 came."""
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return tmp_path


def test_vocabulary_and_merges_become_the_same_tokenizer(tokenizer: Path, gpt2_style: Path, tmp_path: Path) -> None:
    vocabulary = adopt_tokenizer(gpt2_style, tmp_path / "adopted", None)
    assert (vocabulary.size, vocabulary.eod_token, vocabulary.eod_id) == (1000, "<|endoftext|>", 0)
    texts = [*nasty_texts()[:9], *stdlib_texts(3)]
    assert expected_tokens(tmp_path / "adopted", texts) == expected_tokens(tokenizer, texts)


def test_what_comes_out_loads_in_transformers(tokenizer: Path, gpt2_style: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    adopt_tokenizer(gpt2_style, tmp_path / "adopted", None)
    for folder in (tokenizer, tmp_path / "adopted"):
        loaded = AutoTokenizer.from_pretrained(folder)
        assert (loaded.eos_token, loaded.eos_token_id, len(loaded)) == ("<|endoftext|>", 0, 1000)
        assert loaded("def f(x):")["input_ids"] == expected_tokens(tokenizer, ["def f(x):"])[0][:-1]
