"""DeepSpeed checkpoints of plain Hugging Face runs come in, bit for bit, and train on; ours go out as universal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import deepspeed_run
from tests.distributed.deepspeed_run import KINDS, Setup
from tests.distributed.test_checkpoint_memory import _growth as growth
from tests.harness import run_ranks
from tests.tiny import GPT2, LLAMA, NO_DROPOUT, tiny_json, tiny_recipe, tiny_store, train_on_ranks
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.export.deepspeed_import import import_checkpoint
from zeropipe.trainer.export.universal import write_universal

pytestmark = pytest.mark.distributed
MODELS = {"gpt2": {**GPT2, **NO_DROPOUT}, "llama": LLAMA}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("exchange") / "store")


def recipe_for(store: Path, output: Path, model: str, groups: int = 2, **sections: Any) -> dict[str, Any]:
    return tiny_recipe(
        store,
        output,
        model={"config": MODELS[model]},
        optimizer={"lr": 1e-3, "weight_decay": 0.1 if groups == 2 else 0.0},
        schedule={"type": "constant", "warmup": 0},
        **sections,
    )


def written(recipe: dict[str, Any], folder: Path) -> str:
    import yaml

    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def holds(path: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint.open(path)
    return {f"{kind}/{name}": checkpoint.read(name, kind).numpy().tobytes()
            for name in checkpoint.names() for kind in KINDS}  # fmt: skip


@pytest.mark.parametrize(
    ("setup", "model", "resumed"),
    [
        (Setup(0), "llama", "zero1"),
        (Setup(1, groups=1, scheduler=True), "gpt2", "zero0"),
        (Setup(2, offload=True, wrapped=True), "llama", "zero3"),
        (Setup(3), "gpt2", "zero2"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"zero{value.stage}",
)
def test_a_run_comes_in_and_trains_on(setup, model, resumed, store, tmp_path):
    recipe = recipe_for(store, tmp_path / "run", model, setup.groups)
    ds = tiny_json(resumed)
    if setup.scheduler:
        del recipe["schedule"]
        ds["scheduler"] = deepspeed_run.SCHEDULER
    arguments = setup, recipe, MODELS[model], str(tmp_path / "theirs"), 3, 3
    theirs = run_ranks(2, deepspeed_run.train_and_save, *arguments)[0]
    done = import_checkpoint(tmp_path / "theirs", None, written(recipe, tmp_path), trust=True)
    assert (done.kind, done.step) == (f"ZeRO-{setup.stage}", 3)
    assert done.notes == []
    ours = holds(done.path)
    assert ours.keys() == theirs["held"].keys() and len(ours) > 60
    assert [name for name in ours if ours[name] != theirs["held"][name]] == []
    losses = train_on_ranks(1, recipe, ds)["loss"]
    assert len(losses) == 3
    assert losses == pytest.approx(theirs["losses"], rel=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_what_was_saved_before_the_first_step_comes_in(groups, store, tmp_path):
    recipe, source = recipe_for(store, tmp_path / "run", "gpt2", groups), str(tmp_path / "theirs")
    setup = Setup(0, groups=groups)
    theirs = run_ranks(1, deepspeed_run.save_untrained, setup, recipe, MODELS["gpt2"], source)[0]
    done = import_checkpoint(source, None, written(recipe, tmp_path), trust=True)
    assert (done.kind, done.step) == ("ZeRO-0", 0)
    checkpoint = Checkpoint.open(done.path)
    assert {name: checkpoint.read(name).numpy().tobytes() for name in checkpoint.names()} == theirs
    assert {kind for name in checkpoint.names() for kind in checkpoint.kinds(name)} == {"master"}


@pytest.mark.parametrize("setup", [Setup(1), Setup(3, precision="bf16")], ids=["zero1", "zero3-bf16"])
def test_a_universal_folder_comes_in(setup, store, tmp_path):
    recipe, source = recipe_for(store, tmp_path / "run", "gpt2"), str(tmp_path / "theirs")
    theirs = run_ranks(2, deepspeed_run.train_and_save, setup, recipe, MODELS["gpt2"], source, 3, 0)[0]
    run_ranks(1, deepspeed_run.to_universal, f"{source}/global_step3", str(tmp_path / "universal" / "three"))
    for folder, kind in (("theirs", f"ZeRO-{setup.stage}"), ("universal", "universal")):
        done = import_checkpoint(tmp_path / folder, tmp_path / kind, written(recipe, tmp_path), trust=True)
        assert (done.kind, done.step) == (kind, 3)
        assert holds(done.path) == theirs["held"]


@pytest.mark.parametrize("setup", [Setup(2), Setup(3, groups=1, sub_group=10**9)], ids=["zero2", "zero3"])
def test_ours_goes_out_as_a_universal_folder(setup, store, tmp_path):
    """On stage 3 with one group: with more, DeepSpeed's loader gives all of them one and the same step counter."""
    recipe = recipe_for(store, tmp_path / "run", "gpt2", setup.groups, save={"every": 3, "keep": 10})
    losses = train_on_ranks(1, recipe, tiny_json("zero1"))["loss"]
    write_universal(tmp_path / "run" / "checkpoints" / "step-00000003", tmp_path / "universal")
    arguments = setup, recipe, MODELS["gpt2"], str(tmp_path / "universal"), 24, 3
    theirs = run_ranks(2, deepspeed_run.load_universal, *arguments)[0]
    assert theirs["held"] == holds(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert theirs["steps"] == 6
    assert theirs["losses"] == pytest.approx(losses[3:], rel=1e-6)


def memory_of_importing(source: str, config: str, output: str) -> int:
    import ctypes

    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back at once
    return growth(lambda: import_checkpoint(source, output, config=config, trust=True))


@pytest.mark.parametrize("stage", [2, 3])
def test_importing_needs_the_memory_of_one_parameter(stage, store, tmp_path):
    import json

    vocab = 1 << 16  # x 64 fp32: an embedding of 16 MiB, its moments as much each, and hardly anything else
    recipe, config = recipe_for(store, tmp_path / "run", "gpt2"), {**MODELS["gpt2"], "vocab_size": vocab}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = str(tmp_path / "theirs")
    run_ranks(2, deepspeed_run.train_and_save, Setup(stage, vocab=vocab), recipe, MODELS["gpt2"], source, 1, 0)
    arguments = source, str(tmp_path / "config.json"), str(tmp_path / "imported")
    (grown,) = run_ranks(1, memory_of_importing, *arguments)
    assert grown < (16 + 8) << 20, f"{grown >> 20} MiB"


@pytest.fixture(scope="module")
def theirs(store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What DeepSpeed saved of a GPT-2."""
    folder = tmp_path_factory.mktemp("theirs")
    recipe = recipe_for(store, folder / "unused", "gpt2")
    run_ranks(2, deepspeed_run.train_and_save, Setup(1), recipe, MODELS["gpt2"], str(folder / "saved"), 1, 0)
    return folder / "saved"


def refusal(source: Path, output: Path, trust: bool = True, **model: Any) -> str:
    import json

    config = output.parent / "config.json"
    config.write_text(json.dumps({**MODELS["gpt2"], "vocab_size": 500, **model}))
    with pytest.raises(UserError) as caught:
        import_checkpoint(source, output, config=config, trust=trust)
    assert "\n" not in str(caught.value)
    assert not list((output / "checkpoints").glob("step-*"))
    return str(caught.value)


def test_pickles_are_opened_on_trust_alone(theirs, tmp_path):
    """Told by a pickle that leaves a trace when it is opened."""
    import shutil

    import torch

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    source = shutil.copytree(theirs, tmp_path / "copy")
    torch.save(Trap(), source / "global_step1" / "mp_rank_00_model_states.pt")
    assert "can run any code" in (text := refusal(source, tmp_path / "run", trust=False)) and "--trust" in text
    assert not (tmp_path / "sprung").exists()
    assert "not what DeepSpeed's save_checkpoint writes" in refusal(source, tmp_path / "run")  # but the trap works
    assert (tmp_path / "sprung").exists()


def test_what_cannot_come_in_is_refused_with_what_to_do(theirs, tmp_path):
    import shutil

    def changed(change) -> Path:
        copy = shutil.copytree(theirs, tmp_path / "copy", dirs_exist_ok=True)
        change(copy / "global_step1")
        return copy

    run, model = tmp_path / "run", "mp_rank_00_model_states.pt"
    assert "transformer.h.2.attn.c_attn.bias is not in the checkpoint" in refusal(theirs, run, n_layer=3)
    assert "transformer.h.1.attn.c_attn.bias is not in the model" in refusal(theirs, run, n_layer=1)
    assert "transformer.wte.weight is [500, 64] in the checkpoint and [512" in refusal(theirs, run, vocab_size=512)
    assert "no DeepSpeed checkpoint here" in refusal(tmp_path, run)
    gone = changed(lambda tag: (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink())
    assert "ranks [1] of 2 are missing" in refusal(gone, run)
    torn = changed(lambda tag: (tag / model).write_bytes((theirs / tag.name / model).read_bytes()[:5000]))
    assert f"{model}: cannot be read" in refusal(torn, run)
    split = changed(lambda tag: shutil.copy(theirs / tag.name / model, tag / "mp_rank_01_model_states.pt"))
    assert "ds_to_universal" in refusal(split, run)
    staged = changed(lambda tag: (tag / "layer_00-model_states.pt").touch())
    assert "a pipeline's checkpoint" in refusal(staged, run)


def test_without_a_recipe_it_is_a_model_to_export(theirs, tmp_path, capsys):
    import json

    from zeropipe.launcher.cli import main

    (tmp_path / "config.json").write_text(json.dumps({**MODELS["gpt2"], "vocab_size": 500}))
    words = ["ckpt", "import", str(theirs), "--config", str(tmp_path), "--output", str(tmp_path / "run")]
    assert main(words) == 2
    assert "--trust" in capsys.readouterr().err
    assert main([*words, "--trust"]) == 0
    assert "imported ZeRO-1: 28 parameters at step 1" in capsys.readouterr().out
    assert main([*words, "--trust"]) == 2  # never over another run's checkpoints
    assert "has checkpoints already" in capsys.readouterr().err
    words = ["ckpt", "convert", str(tmp_path / "run"), "--to", "safetensors", "--output", str(tmp_path / "hf")]
    assert main(words) == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_what_will_not_go_on_as_it_was_is_said(store, theirs, tmp_path):
    recipe = recipe_for(store, tmp_path / "run", "gpt2", duration={"steps": 1})
    recipe["optimizer"] |= {"betas": [0.8, 0.9], "weight_decay": 0.2}
    done = import_checkpoint(theirs, None, written(recipe, tmp_path), samples=0, trust=True)
    assert [note.partition(";")[0] for note in done.notes] == [
        "the optimizer had betas [0.9, 0.95]",
        "weight decay was 0.1",
        "the recipe ends after 1 steps, and this is step 1: nothing is left to do",
    ]
    assert Checkpoint.open(done.path).state["samples_consumed"] == 0
