"""Bytes per token against the length of the encoded text."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from zeropipe.trainer.evaluation.text_bytes import byte_lengths

TEXTS = ["def f(x):\n\treturn x  # ünïcödé", "naïve café 北京 🦜🦜", "\u0000\x7f\u2028 tabs\t\tand   spaces", ""]


@pytest.fixture
def folder(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eod>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["some text to merge, some more text: café, café"] * 5, trainer)
    tokenizer.add_tokens([AddedToken("🦜", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_lengths_add_up_to_the_text(folder, text):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lengths = byte_lengths(folder, tokenizer.get_vocab_size())
    assert lengths is not None
    ids = tokenizer.encode(text).ids
    assert lengths[ids].sum() == len(text.encode())


def test_special_tokens_stand_for_no_text(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lengths = byte_lengths(folder, 1000)
    assert lengths is not None and lengths.dtype == np.int64 and len(lengths) == 1000
    assert lengths[tokenizer.token_to_id("<eod>")] == 0 and lengths[999] == 0


def test_other_tokenizers_have_no_table(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert byte_lengths(tmp_path, 2) is None
    content = {"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": {"type": "Metaspace"}, "decoder": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert byte_lengths(tmp_path, 2) is None
    assert byte_lengths(tmp_path / "nowhere", 2) is None
