"""A store of real text and trained runs, made once for all tests of what comes out of a run."""

from pathlib import Path

import pytest

from tests.unit.trainer.chatting import learned_folder
from tests.unit.trainer.runs import make_store, train_run


@pytest.fixture(scope="session")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 files of the standard library with a byte-level BPE of 512 tokens of its own."""
    return make_store(tmp_path_factory.mktemp("text") / "store")


@pytest.fixture(scope="session")
def gpt2_run(text_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 in fp32, ZeRO-1 on two ranks, 6 steps, saved and evaluated at 3 and 6."""
    return train_run(text_store, tmp_path_factory.mktemp("runs") / "gpt2", "gpt2", "zero1", world=2)


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that answers the questions of `chatting.DIALOGUES`, in ChatML."""
    return learned_folder(tmp_path_factory.mktemp("chat") / "learned")
