"""What is proposed is what `make_plan` takes, and all of it."""

import pytest

from tests.tiny import GPT2, LLAMA, NO_DROPOUT, tiny_json, tiny_recipe, tiny_store
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.plan.plan import make_plan
from zeropipe.trainer.recipe.recipe import Recipe
from zeropipe.trainer.tune.hardware import device_named, parse_device, with_network
from zeropipe.trainer.tune.search import json_for, layouts, micro_batches, plan_of_candidate, search, with_pipeline

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
H100 = device_named("h100")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("tune") / "store")


def recipe_of(store, config, **sections):
    return Recipe.model_validate(tiny_recipe(store, store.parent / "run", model={"config": config}, **sections))


@pytest.mark.parametrize(
    ("config", "precision", "devices"),
    [({**GPT2, **NO_DROPOUT}, {}, 4), (GPT2, {"bf16": {"enabled": True}}, 2), (LLAMA, {"bf16": {"enabled": True}}, 4)],
    ids=["gpt2", "gpt2-bf16", "llama-bf16"],
)
def test_proposes_exactly_what_a_plan_takes(store, config, precision, devices):
    recipe, ds = recipe_of(store, config, batch={"global": 2}), tiny_json("zero1", **precision)
    proposed = {
        (str(one.layout), one.micro_batch, one.checkpointing): one
        for one in search(recipe, ds, devices, H100).candidates
    }
    taken = set()
    for layout in layouts(devices):
        for micro in micro_batches(2, layout):
            for recomputes in (False, True):
                json = json_for(ds, layout, micro, recomputes, H100)
                try:
                    plan = make_plan(with_pipeline(recipe, layout.pipeline), json, devices)
                except UserError:
                    continue
                assert plan.layout == layout
                key = str(layout), micro, recomputes
                taken.add(key)
                assert plan.memory == proposed[key].memory
    assert proposed.keys() == taken


def test_the_fastest_that_fits_is_first_and_its_json_is_a_plan(store):
    recipe = recipe_of(store, GPT2)
    ds = tiny_json("zero2", 2, bf16={"enabled": True}, wall_clock_breakdown=True)
    found = search(recipe, ds, 8, H100)
    seconds = [one.cost.seconds for one in found.fitting]
    assert seconds == sorted(seconds)
    best = found.fitting[0]
    plan = plan_of_candidate(recipe, best)
    assert plan.layout == best.layout
    assert plan.micro_batch * plan.accumulation * plan.layout.data == 8
    assert plan.precision.name == "bf16"
    assert (best.ds["gradient_clipping"], best.ds["wall_clock_breakdown"]) == (0.3, True)


def test_memory_decides_what_fits(store):
    recipe, ds = recipe_of(store, GPT2), tiny_json("zero1")
    least = min(one.memory.peak for one in search(recipe, ds, 2, H100).candidates)
    small = with_network(H100, None, None, least / 0.94 / 1e9 * 1.01)
    found = search(recipe, ds, 2, small)
    assert 0 < len(found.fitting) < len(found.candidates)
    assert max(one.memory.peak for one in found.fitting) <= least * 1.01


def test_the_global_batch_of_the_json_is_kept(store):
    recipe = recipe_of(store, GPT2).model_copy(
        update={"batch": recipe_of(store, GPT2).batch.model_copy(update={"global_batch": None})}
    )
    with pytest.raises(UserError, match=r"state batch\.global"):
        search(recipe, tiny_json("zero1"), 2, H100)
    found = search(recipe, tiny_json("zero1", train_batch_size=4), 2, H100)
    assert {one.settings.global_batch for one in found.candidates} == {4}
    assert plan_of_candidate(recipe, found.fitting[0]).global_batch == 4


def test_a_family_whose_work_is_not_known_is_refused(store):
    config = {"model_type": "mixtral", "num_local_experts": 4, **SMALL}
    with pytest.raises(UserError, match=r"'mixtral': model.layers.0.mlp.experts.gate_up_proj is no linear: experts"):
        search(recipe_of(store, config), tiny_json("zero1"), 2, H100)


def test_a_derived_family_is_counted_as_the_written_one_of_its_sizes(store):
    """Mistral's blocks are Llama's."""
    recipes = [recipe_of(store, {"model_type": name, **SMALL}) for name in ("llama", "mistral")]
    ours, derived = (search(recipe, tiny_json("zero1"), 2, H100).candidates for recipe in recipes)
    assert [str(one) for one in ours] and {str(one) for one in ours} == {str(one) for one in derived}
    layouts_of = {str(one): one for one in ours}
    assert all(one.cost.seconds == pytest.approx(layouts_of[str(one)].cost.seconds, rel=0.1) for one in derived)


def test_accelerators_by_name_and_by_numbers():
    assert device_named("A100").memory == 80 * 2**30
    with pytest.raises(UserError, match=r"'h10'.*did you mean 'h100'.*leave it out"):
        device_named("h10")
    own = parse_device("bf16=500,memory=64,bandwidth=1800,network=100")
    assert (own.peak["bfloat16"], own.memory, own.bandwidth) == (500e12, 64e9, 1800e9)
    assert own.far.bandwidth == pytest.approx(0.8 * 100 / 8 * 1e9)
    for text, said in (
        ("bf16=500,memory=64", "bandwidth is missing"),
        ("bf16=500,memroy=64", "no 'memroy', did you mean 'memory'"),
        ("bf16=fast", "'bf16=fast': expected a number above 0"),
    ):
        with pytest.raises(UserError, match=said):
            parse_device(text)
