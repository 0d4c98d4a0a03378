"""Recipes: numbers, overrides, defaults, and one clear line for everything that can be wrong in one."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.data.splits import split_bounds
from zeropipe.trainer.recipe.recipe import Recipe, dump_recipe, load_recipe

MINIMAL = """\
model: {config: {model_type: gpt2}}
data: {train: [{store: data/x}]}
duration: {steps: 10}
"""


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str = MINIMAL, *overrides: str) -> Recipe:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return load_recipe(str(path), overrides)

    return write


def refusal(recipe, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_follow_the_file_name(recipe):
    loaded = recipe()
    assert (loaded.name, loaded.output) == ("my", Path("runs/my"))
    assert loaded.data.split == "949,50,1" and loaded.data.seq_len == 1024
    assert loaded.resume == "auto" and loaded.parallel.pipeline == 1


@pytest.mark.parametrize(("text", "value"), [("6e-4", 6e-4), ("1.5e-4", 1.5e-4), ("6E-4", 6e-4), ("1e+2", 100.0)])
def test_exponents_are_numbers_although_yaml_1_1_says_strings(recipe, text: str, value: float):
    assert isinstance(yaml.safe_load("6e-4"), str)  # the trap
    assert recipe(MINIMAL + f"optimizer: {{lr: {text}}}\n").optimizer.lr == value
    assert recipe(MINIMAL, f"optimizer.lr={text}").optimizer.lr == value


def test_words_that_look_a_little_like_numbers_stay_words(recipe):
    loaded = recipe(MINIMAL, "name=1e5x", "data.train=[{store: data/2024e}]")
    assert (loaded.name, loaded.data.train[0].store) == ("1e5x", "data/2024e")


def test_counts_may_be_written_with_exponents(recipe):
    assert recipe(MINIMAL.replace("steps: 10", "tokens: 10e9")).duration.tokens == 10_000_000_000
    assert "duration.tokens" in refusal(recipe, MINIMAL.replace("steps: 10", "tokens: 1.5"))


def test_overrides(recipe):
    loaded = recipe(
        MINIMAL,
        "optimizer.betas=[0.8, 0.9]",
        "data.train.0.weight=2",
        "model.config.n_layer=3",
        "batch.global=64",
        "output=/tmp/a=b",
    )
    assert loaded.optimizer.betas == (0.8, 0.9)
    assert loaded.data.train[0].weight == 2.0
    assert loaded.model.config == {"model_type": "gpt2", "n_layer": 3}
    assert loaded.batch.global_batch == 64
    assert recipe(MINIMAL, "duration.steps=null", "duration.epochs=2").duration.epochs == 2
    assert loaded.output == Path("/tmp/a=b")


def test_the_home_folder_is_found_in_paths(recipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ("output=~/runs", "data.train.0.store=~/data/x", "tokenizer=~/t", "resume=~/old", "model.init=~/m")
    loaded = recipe(MINIMAL, *words)
    found = (loaded.output, loaded.data.train[0].store, loaded.tokenizer, loaded.resume, loaded.model.init)
    assert [str(path) for path in found] == [f"/home/me/{name}" for name in ("runs", "data/x", "t", "old", "m")]


def test_warmup_is_steps_or_a_fraction(recipe):
    assert recipe(MINIMAL, "schedule.warmup=100").schedule.warmup == 100
    assert recipe(MINIMAL, "schedule.warmup=0.25").schedule.warmup == 0.25
    assert "a fraction of all steps is below 1" in refusal(recipe, MINIMAL, "schedule.warmup=1.0")


def test_objective_and_adapter_are_a_name_or_a_mapping_with_options(recipe, tmp_path: Path):
    loaded = recipe()
    assert (loaded.objective, loaded.adapter) == ("causal_lm", "none")
    loaded = recipe(MINIMAL, "objective={type: dpo, beta: 0.1}", "adapter.type=lora", "adapter.r=16")
    assert loaded.objective == {"type": "dpo", "beta": 0.1}
    assert loaded.adapter == {"type": "lora", "r": 16}
    (tmp_path / "again.yaml").write_text(dump_recipe(loaded))
    assert load_recipe(str(tmp_path / "again.yaml")) == loaded


def test_a_mapping_of_the_type_alone_is_the_name(recipe):
    """Else a resume would take one spelling for another run."""
    loaded = recipe(MINIMAL, "objective={type: causal_lm}", "adapter={type: none}")
    assert (loaded.objective, loaded.adapter) == ("causal_lm", "none")


def test_a_recipe_is_frozen(recipe):
    with pytest.raises(ValidationError, match="frozen"):
        recipe().seed = 5


def test_a_dumped_recipe_reads_back_equal(recipe, tmp_path: Path):
    stated = recipe(
        MINIMAL, "schedule.type=wsd", "schedule.decay=0.1", "optimizer.lr=6e-4", "data.valid=[{store: data/v}]"
    )
    (tmp_path / "again.yaml").write_text(dump_recipe(stated))
    assert load_recipe(str(tmp_path / "again.yaml")) == stated
    unstated = recipe()
    (tmp_path / "again.yaml").write_text(dump_recipe(unstated))
    again = load_recipe(str(tmp_path / "again.yaml"))
    assert again == unstated
    assert "schedule" not in again.model_fields_set  # a JSON with a scheduler of its own must still fit


REFUSALS = {
    "optimizer.lrr=1": "optimizer.lrr: unknown key, did you mean 'lr'?",
    "optimiser={lr: 1}": "optimiser: unknown key, did you mean 'optimizer'?",
    "lr=1": "lr: unknown key, did you mean 'optimizer.lr'?",
    "every=1": "every: unknown key, did you mean 'log.every' or 'eval.every' or 'save.every'?",
    "batch.micro_batch=4": "batch.micro_batch: unknown key; that is train_micro_batch_size_per_gpu of the DeepSpeed",
    "bf16={enabled: true}": "bf16: unknown key; that is the DeepSpeed JSON",
    "data.train=[{stroe: x}]": "data.train.0.store: missing; data.train.0.stroe: unknown key, did you mean 'store'?",
    "parallel.tensor=2": "parallel.tensor: unknown key; that is tensor_parallel.autotp_size of the DeepSpeed JSON",
    "optimizer.lr=fast": "optimizer.lr: must be a number, got 'fast'",
    "optimizer.lr=-1": "optimizer.lr: must be greater than 0, got -1",
    "optimizer.betas=[0.9, 1.0]": "optimizer.betas.1: must be less than 1, got 1.0",
    "save.milestone=750": "save: milestone: 750 is no multiple of every (500); state e.g. 1000",
    "save={every: 0, milestone: 9}": "save: milestone: 9 with every: 0, which saves at the end only; state every too",
    "save.every=true": "save.every: must be a whole number, got True",
    "seed=1.5": "seed: must be a whole number, got 1.5",
    "duration.tokens=5": "exactly one of steps, tokens, epochs; got steps, tokens (duration.steps=null takes one away)",
    "duration={}": "duration: state exactly one of steps, tokens, epochs; got none",
    "data.split=most": "split must be shares of train, valid and test, such as '949,50,1'; got 'most'",
    'data.split="0,1,1"': "split must be shares",
    "objective={beta: 1}": "objective: must be a name, or a mapping with the name as its type; got {'beta': 1}",
    "adapter=3": "adapter: must be a name, or a mapping with the name as its type; got 3",
    "schedule.type=cosin": "schedule.type: must be 'constant', 'linear', 'cosine' or 'wsd', got 'cosin'",
    "schedule.decay=5": "schedule: decay is for type wsd only; cosine ignores it, so leave it out",
    "schedule={type: wsd, warmup: -1}": "schedule.warmup: must be steps (a whole number) or a fraction of all steps",
    "parallel.partition=even": "parallel.partition: must be parameters, uniform, measured or type:REGEX, got 'even'",
    "parallel.partition=type:(": "partition 'type:(': not a regular expression",
    "model.config={n_layer: 3}": "model (line 1): config.model_type is missing",
    "data.train=[]": "data.train: must not be empty, got []",
    "model=gpt2": "model: must be a mapping of keys, got 'gpt2'",
    "data.train.5.store=x": "override 'data.train.5.store=x': data.train is a list of 1; there is no 5 in it",
    "duration.steps.x=1": "duration.steps is a plain value; there is no 'x' in it",
    "data.0=1": "data is a mapping, and takes names; there is no 0 in it",
    "steps": "overrides are written section.key=value",
    "=5": "overrides are written section.key=value",
    "optimizer.lr={": "override 'optimizer.lr={', line 1:",
}


@pytest.mark.parametrize(("override", "message"), REFUSALS.items(), ids=list(REFUSALS))
def test_refusals(recipe, override: str, message: str):
    found = refusal(recipe, MINIMAL, override)
    assert message in found
    assert "my.yaml" in found or "override" in found


def test_one_line_lists_everything_with_its_line(recipe):
    message = refusal(recipe, MINIMAL + "optimizer:\n  lrr: 1\n  eps: -1\nsave: {evry: 5}\n")
    assert "optimizer.lrr (line 5): unknown key, did you mean 'lr'?" in message
    assert "optimizer.eps (line 6): must be greater than 0, got -1" in message
    assert "save.evry (line 7): unknown key, did you mean 'every'?" in message


def test_what_is_no_recipe(recipe, tmp_path: Path):
    assert "line 2: 'seed' is stated twice" in refusal(recipe, "seed: 1\nseed: 2\n")
    assert "line 2" in refusal(recipe, "model: {\n  x: [}\n")
    assert "a recipe is a mapping of sections; got list" in refusal(recipe, "[1]")
    assert "got NoneType" in refusal(recipe, "")
    assert "model: missing; data: missing; duration: missing" in refusal(recipe, "seed: 1")
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff")
    for path, expected in (
        ("gpt2_345", "no such file, did you mean 'gpt2_345m'?; shipped recipes: cpt, demo"),
        (str(tmp_path), "is a directory"),
        (str(tmp_path / "bytes.yaml"), "not UTF-8"),
    ):
        with pytest.raises(UserError, match=expected.replace("?", r"\?")):
            load_recipe(path)


def test_own_validation_stores_replace_the_split(recipe):
    loaded = recipe(MINIMAL, "data.valid=[{store: data/v}]")
    assert loaded.data.shares == (1, 0, 0)
    assert "split and valid are both stated" in refusal(
        recipe, MINIMAL.replace("x}]", 'x}], split: "98,2", valid: [{store: v}]')
    )


def test_split_bounds_cover_the_documents_in_order():
    assert split_bounds(1000, (949, 50, 1)) == [(0, 949), (949, 999), (999, 1000)]
    assert split_bounds(10, (1, 0, 0)) == [(0, 10), (10, 10), (10, 10)]
    assert split_bounds(3, (0.7, 0.2, 0.1)) == [(0, 2), (2, 3), (3, 3)]
    for documents in range(40):
        bounds = split_bounds(documents, (949, 50, 1))
        assert [first for first, _ in bounds] == [0, bounds[0][1], bounds[1][1]] and bounds[2][1] == documents
        assert all(first <= last for first, last in bounds)
    # shares of a size at which floating point would lose whole documents
    huge = 10**17 + 7
    assert split_bounds(huge, (0.1, 0.2, 0.7))[0] == (0, (huge + 5) // 10)
