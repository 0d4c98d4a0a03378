"""The table of what combines, tried again: a few of each outcome here, all of it in `make verify`."""

from __future__ import annotations

from functools import cache

import pytest

from tests.distributed import legality_trials
from tests.distributed.legality_table import Combination, known_table
from tests.distributed.legality_trials import combinations, splits

pytestmark = pytest.mark.distributed
TABLE = known_table().trials
AGAIN = [
    Combination(stage=0, precision="bf16"),
    Combination(stage=1, precision="bf16"),
    Combination(stage=2, offload="optimizer and parameters"),
    Combination(data=2, stage=3, offload="optimizer and parameters"),
    Combination(pipeline=2, stage=2),
]
known = cache(legality_trials.truths)


@pytest.mark.parametrize("combination", AGAIN, ids=str)
def test_it_still_comes_to_the_same(combination):
    trial, recorded = legality_trials.try_alone(combination, known()), TABLE[combination]
    assert trial.outcome == recorded.outcome, trial.detail
    if trial.outcome in ("raises", "ignored"):
        assert trial.detail == recorded.detail


def test_every_outcome_is_among_them():
    assert {TABLE[combination].outcome for combination in AGAIN} == {"works", "differs", "ignored", "raises"}


def test_the_table_holds_every_combination():
    assert list(TABLE) == [combination for split in splits() for combination in combinations(split)]


@pytest.mark.slow
@pytest.mark.parametrize("split", splits(), ids=lambda split: " x ".join(f"{a}{n}" for a, n in split.items()) or "one")
def test_all_of_the_table(split, record_property):
    """Every trial of one split of the ranks."""
    found = list(legality_trials.try_all(list(combinations(split)), known()))
    outcomes = {str(trial.combination): trial.outcome for trial in found}
    assert outcomes == {str(trial.combination): TABLE[trial.combination].outcome for trial in found}
    for outcome in sorted(set(outcomes.values())):
        record_property(outcome, sum(value == outcome for value in outcomes.values()))
