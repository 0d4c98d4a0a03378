"""Plans say of DeepSpeed's levers what docs/deepspeed_features.md says they do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.feature_trials import LEVERS, Lever, json_of, refusal
from tests.tiny import tiny_recipe, tiny_store, write_pair
from zeropipe.launcher.cli import main

TABLE = Path(__file__).parents[3] / "distributed" / "features.json"
RECORDED = {name: (outcome, detail) for name, outcome, detail in json.loads(TABLE.read_text())}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("data") / "store", documents=60)


def test_every_lever_was_tried_and_none_is_wrong():
    assert list(RECORDED) == [lever.key for lever in LEVERS]
    assert {outcome for outcome, _ in RECORDED.values()} == {"works", "raises"}
    assert [lever.key for lever in LEVERS if (RECORDED[lever.key][0] == "works") != (lever.test is not None)] == []
    tests = {lever.test for lever in LEVERS if lever.test}
    assert all((TABLE.parent / test).is_file() for test in tests)


@pytest.mark.parametrize("lever", LEVERS, ids=lambda lever: lever.key)
def test_plans_agree(lever: Lever, store: Path):
    outcome, detail = RECORDED[lever.key]
    said = refusal(lever, store)
    # a list of optimizers ends with those that other tests have registered
    assert said is None if outcome == "works" else (said or "").startswith(detail)


@pytest.mark.parametrize("lever", [lever for lever in LEVERS if lever.test is None], ids=lambda lever: lever.key)
def test_zeropipe_plan_says_so_with_what_to_do_instead(lever: Lever, store: Path, tmp_path: Path, capsys):
    recipe, ds = write_pair(tmp_path, tiny_recipe(store, tmp_path / "run"), json_of(lever))
    code = main(["plan", str(recipe), "--deepspeed_config", str(ds), "--devices", "2"])
    (said,) = capsys.readouterr().err.splitlines()
    assert code == 2 and said.startswith("error: ")
    key = lever.key.partition(" ")[0]
    assert key in said
    assert any(words in said for words in ("; use ", "leave it out", "; set ", "; there is no replacement", "; state "))
