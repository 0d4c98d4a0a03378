from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from tests.unit.data_prep.samples import stdlib_texts
from zeropipe.data_prep.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: byte-level BPE, 1,000 tokens, trained on a little of the standard library."""
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(stdlib_texts(20), 1000, folder, None)
    return folder


@pytest.fixture(scope="session")
def stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))
