"""The plan accepts what worked when it was tried with the pinned DeepSpeed, and refuses everything else that was."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from tests.distributed.legality_table import Combination, Table, known_table, nearest_working
from tests.tiny import GPT2
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.plan.deepspeed_json import reconcile
from zeropipe.trainer.plan.deepspeed_keys import DEEPSPEED_VERSION
from zeropipe.trainer.plan.family_layouts import family_tried
from zeropipe.trainer.plan.layout import Layout
from zeropipe.trainer.plan.legality import check, layout_of
from zeropipe.trainer.plan.settings import read_settings
from zeropipe.trainer.recipe.recipe import Recipe

TABLE = known_table()
MODEL = {**GPT2, "vocab_size": 500}


def verdict(combination: Combination) -> str | None:
    """Why a plan of it is refused; None where it is accepted."""
    recipe = Recipe.model_validate(
        {
            "name": "tried",
            "model": {"config": MODEL},
            "data": {"train": [{"store": "none"}], "seq_len": 32},
            "parallel": {"pipeline": combination.pipeline},
            "batch": {"global": 8},
            "duration": {"steps": 3},
        }
    )
    ds = {
        **combination.sections,
        "tensor_parallel": {"autotp_size": combination.tensor},
        "sequence_parallel_size": combination.sequence,
    }
    settings = read_settings(ds)
    layout = layout_of(recipe, settings, combination.world)
    assert layout == combination.layout
    try:
        check(recipe, read_settings(reconcile(recipe, settings, layout)), layout, MODEL)
    except UserError as error:
        return str(error)
    return None


def test_the_table_was_made_with_what_is_pinned():
    assert TABLE.made_with["deepspeed"] == DEEPSPEED_VERSION == version("deepspeed")
    assert TABLE.made_with["torch"].partition("+")[0] == version("torch").partition("+")[0]
    assert len(TABLE.trials) > 350
    assert {trial.outcome for trial in TABLE.trials.values()} >= {"works", "raises", "differs", "ignored"}


def test_plans_agree_with_every_trial():
    wrong = {}
    for combination, trial in TABLE.trials.items():
        refusal = verdict(combination)
        if (refusal is None) != (trial.outcome == "works"):
            wrong[str(combination)] = trial.outcome, refusal
    assert wrong == {}


def test_every_refusal_says_what_to_do_and_has_something_legal_nearby():
    for combination, trial in TABLE.trials.items():
        if trial.outcome == "works":
            continue
        message = verdict(combination) or ""
        assert any(word in message for word in ("use ", "needs ", "set ", "leave it out")), message
        near = nearest_working(combination, TABLE)
        assert near and all(way.count(",") <= 2 for way in near), combination


def test_the_table_is_read_as_it_was_written(tmp_path):
    TABLE.write(tmp_path / "copy.json")
    assert Table.read(tmp_path / "copy.json") == TABLE


@pytest.mark.parametrize(
    ("wanted", "ways"),
    [
        (Combination(), []),
        (Combination(stage=0, precision="bf16", data=2), ["stage 1", "stage 2", "stage 3"]),
        (Combination(stage=1, pipeline=2, sequence=2), ["sequence 1", "pipeline 1"]),
    ],
)
def test_the_nearest(wanted: Combination, ways: list[str]):
    found = nearest_working(wanted, TABLE, most=20)
    assert set(ways) <= set(found) if ways else found == [""]


def test_tiled_mlps_need_a_record_that_names_them():
    sections = {"data": {"train": [{"store": "none"}], "seq_len": 32}, "duration": {"steps": 3}, "mlp_tile": 16}
    settings = read_settings({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})

    def refuse(model: dict) -> None:
        recipe = Recipe.model_validate({"model": {"config": model}, **sections})
        check(recipe, settings, layout_of(recipe, settings, 1), model)

    refuse(MODEL)
    with pytest.raises(UserError, match=r"^mlp_tile of model_type 'qwen3': its record names no MLP"):
        refuse({"model_type": "qwen3", "vocab_size": 500})


def test_what_was_tried_of_a_family_and_does_not_follow_one_process_is_refused(monkeypatch):
    cells = {"ZeRO-0": {"works": {}}, "TP 2": {"works": {}}, "PP 2": {"differs": "step 3"}, "SP 2": {"fails": "a size"}}
    sizes_too_small = {"ZeRO-0": {"fails": "sizes"}, "SP 2": {"fails": "sizes"}}
    known = {"gptj": {"cells": cells}, "opt": {"cells": sizes_too_small}}
    monkeypatch.setattr("zeropipe.trainer.plan.family_layouts.outcomes", lambda: known)

    def refusals(name: str, **sizes: int) -> list[str]:
        return list(family_tried(Layout(2, 1, zero_stage=1, **sizes), {"model_type": name}))

    assert refusals("gptj", tensor=2) == refusals("llama", sequence=2) == refusals("opt", sequence=2) == []
    [differs] = refusals("gptj", pipeline=2)
    assert differs.startswith(
        "PP 2 of model_type 'gptj': it was tried, small, and differs (step 3); `zeropipe families"
    )
    [fails] = refusals("gptj", sequence=2)
    assert "fails (a size)" in fails
