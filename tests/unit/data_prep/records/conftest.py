from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data_prep.records.samples import CHATML, make_folder, train_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def chatml(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a ChatML template without markers, as SmolLM2 has."""
    return make_folder(base, tmp_path_factory.mktemp("chatml") / "tokenizer", CHATML, None, "<|im_end|>")
