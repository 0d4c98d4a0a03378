"""The data of a run is opened once, and stays what it was when the run began."""

import json
from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.tiny import _train, tiny_json, tiny_recipe, tiny_store

pytestmark = pytest.mark.distributed


def _train_while_the_store_is_replaced(recipe: dict, ds: dict, store: str, other: str) -> list[int]:
    """Puts another store's manifest in the place of this one's after the first step; gives how often stores were opened
    by then, and at the end.
    """
    from zeropipe.data_prep.store import TokenStore
    from zeropipe.trainer.engine.base import Engine

    opened, counts, real, step = [], [], TokenStore._open_directory.__func__, Engine.train_step  # type: ignore[attr-defined]

    def opening(cls, path: Path):
        opened.append(path)
        return real(cls, path)

    def train_step(self, stream, number, *asked):
        if number == 1:
            counts.append(len(opened))
            (Path(store) / "manifest.json").write_bytes((Path(other) / "manifest.json").read_bytes())
        return step(self, stream, number, *asked)

    TokenStore._open_directory = classmethod(opening)  # type: ignore[assignment]
    Engine.train_step = train_step  # type: ignore[method-assign]
    _train(recipe, ds)
    return [*counts, len(opened)]


def test_a_store_that_is_replaced_while_a_run_trains_changes_nothing_of_what_it_saves(tmp_path):
    store, other = tiny_store(tmp_path / "store"), tiny_store(tmp_path / "other", seed=1)
    recipe = tiny_recipe(store, tmp_path / "run", duration={"steps": 3}, save={"every": 1})
    (counts,) = run_ranks(1, _train_while_the_store_is_replaced, recipe, tiny_json(), str(store), str(other))
    before, after = counts
    assert before == after > 0
    states = sorted((tmp_path / "run" / "checkpoints").glob("step-*/state.json"))
    saved = [json.loads(path.read_text())["data"] for path in states]
    assert len(saved) == 3 and saved[0] == saved[1] == saved[2]
