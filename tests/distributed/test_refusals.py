"""What a training process refuses, as its user sees it: exit code 2, one clear line, nothing lost."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness import RankGroup, run_ranks
from tests.tiny import GPT2, LLAMA, folder_of_zeros, tiny_json, tiny_recipe, tiny_store, train_on_ranks, write_pair
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.ranks.ports import free_port

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("data") / "store")


def trainer(arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr of this rank's trainer."""
    from zeropipe.trainer.commands.train import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(arguments)
    return code, errors.getvalue()


def refused(folder: Path, recipe: dict, ds: dict, world: int = 2) -> str:
    """Trains on `world` ranks; returns the one line that rank 0 said while all ended with code 2."""
    files = write_pair(folder, recipe, ds)
    results = run_ranks(world, trainer, ["--run", str(files[0]), "--deepspeed_config", str(files[1])])
    assert [code for code, _ in results] == [2] * world
    said = [line for _, errors in results for line in errors.splitlines()]
    assert len(said) == 1 and said[0].startswith("error: "), said
    return said[0]


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> dict:
    """The recipe of a run of two steps with a checkpoint of each."""
    output = tmp_path_factory.mktemp("finished") / "run"
    recipe = tiny_recipe(store, output, duration={"steps": 2}, save={"every": 1, "keep": 2}, schedule={"warmup": 0})
    train_on_ranks(2, recipe, tiny_json("zero1"))
    return recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 99}, "seed was 1234, this run says 99"),
        ({"data": {"seq_len": 16}}, "seq_len was 32, this run says 16"),
        ({"data": {"split": "80,20"}}, "data was"),
        ({"model": {"config": {**GPT2, "n_embd": 32}}}, "model_config was"),
    ],
    ids=["seed", "seq_len", "data", "model"],
)
def test_resuming_another_run(finished, change, words, tmp_path):
    kept = [path for path in Path(finished["output"]).rglob("*") if path.suffix in (".yaml", ".safetensors", ".json")]
    before = {path: path.read_bytes() for path in kept if path.name != "environment.json"}
    recipe = {**finished, "duration": {"steps": 4}}
    for key, value in change.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) else value
    assert words in refused(tmp_path, recipe, tiny_json("zero1"))
    assert before == {path: path.read_bytes() for path in before}


def test_resume_from_a_path_without_a_checkpoint(finished, store, tmp_path):
    recipe = {**finished, "output": str(tmp_path / "new"), "resume": str(tmp_path / "nowhere")}
    assert "holds no checkpoint" in refused(tmp_path, recipe, tiny_json("zero1"))


def test_a_flipped_byte_in_the_only_checkpoint(store, tmp_path):
    recipe = tiny_recipe(store, tmp_path / "run", duration={"steps": 1}, schedule={"warmup": 0})
    train_on_ranks(2, recipe, tiny_json("zero1"))
    (file, *_) = (tmp_path / "run" / "checkpoints").rglob("*rank*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    said = refused(tmp_path, {**recipe, "duration": {"steps": 2}}, tiny_json("zero1"))
    assert "no whole checkpoint" in said and file.name in said


def _hold(output: str) -> None:
    import fcntl

    Path(output).mkdir()
    lock = (Path(output) / ".lock").open("w")
    lock.write("process 1 on elsewhere\n")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    time.sleep(60)


def test_two_runs_in_one_directory(store, tmp_path):
    holder = RankGroup(1, _hold, str(tmp_path / "run"))
    try:
        while not (tmp_path / "run" / ".lock").exists() or not (tmp_path / "run" / ".lock").read_text():
            time.sleep(0.05)
        said = refused(tmp_path, tiny_recipe(store, tmp_path / "run"), tiny_json("zero1"))
        assert "is in use by process 1 on elsewhere" in said
        assert not list((tmp_path / "run").glob("*.yaml"))
    finally:
        holder.kill()


def test_an_output_that_cannot_be_made(store, tmp_path):
    (tmp_path / "file").write_text("in the way")
    recipe = tiny_recipe(store, tmp_path / "file" / "run")
    assert "cannot be written" in refused(tmp_path, recipe, tiny_json("zero1"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("store: sample 5 holds token 900"), "store: sample 5 holds token 900 (on rank 1)"),
        (
            OSError(errno.ESTALE, "Stale file handle", "/data/store"),
            "/data/store: cannot read the data: Stale file handle (on rank 1)",
        ),
        (MemoryError(), "cannot read the data: out of memory; fewer ranks on a host need less (on rank 1)"),
    ],
    ids=["other data", "bad disk", "no memory"],
)
def test_what_only_one_rank_meets_in_its_data_is_told_by_all(store, tmp_path, error, told):
    """Its reader's thread alone finds out, and nobody hangs."""
    said = run_ranks(2, _train_on_other_data, tiny_recipe(store, tmp_path / "run"), tiny_json("zero1"), error)
    assert said == [told] * 2


def _train_on_other_data(recipe: dict, ds: dict, error: Exception) -> str:
    from tests.tiny import _train
    from zeropipe.trainer.data import batches as data

    real = data.make_batch

    def spoilt(*arguments):
        if int(os.environ["RANK"]) == 1:
            raise error
        return real(*arguments)

    data.make_batch = spoilt
    try:
        _train(recipe, ds)
    except UserError as error:
        return str(error)
    return "trained"


def test_a_loss_that_is_no_number_stops_the_run(store, tmp_path):
    recipe = tiny_recipe(store, tmp_path / "run", optimizer={"lr": 1e30}, schedule={"type": "constant", "warmup": 0})
    said = refused(tmp_path, recipe, tiny_json("zero1"))
    assert "the loss is nan" in said and "lower optimizer.lr" in said
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def _train_without_a_record(recipe: dict, ds: dict) -> str:
    from tests.tiny import _train
    from zeropipe.trainer.metrics.record import RunLog

    real = RunLog._write

    def full(self, record, message):
        if record["step"] == 2:
            raise UserError("metrics.jsonl: the run's record cannot be written: No space left on device")
        return real(self, record, message)

    RunLog._write = full
    try:
        _train(recipe, ds)
    except UserError as error:
        return str(error)
    return "trained"


def test_a_record_that_cannot_be_written_saves_and_stops_all_ranks(store, tmp_path):
    """Only rank 0 writes it; the others must learn of it, and no step may be lost."""
    said = run_ranks(2, _train_without_a_record, tiny_recipe(store, tmp_path / "run"), tiny_json("zero1"))
    assert len(set(said)) == 1 and "No space left" in said[0]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


def test_a_precision_that_the_accelerator_lacks(store, tmp_path):
    said = refused(tmp_path, tiny_recipe(store, tmp_path / "run"), tiny_json("zero1", fp16={"enabled": True}))
    assert "fp16: the accelerator (cpu) cannot train in it; enable bf16" in said


def _train_with_a_bad_gradient(recipe: dict, ds: dict) -> str:
    """The loss of step 2 is fine and its gradient is not: what a bad sample or a bad chip can do."""
    from tests.tiny import _train
    from zeropipe.trainer.engine.zero import ZeroEngine

    real = ZeroEngine._update

    def spoilt(self, batch, step, weight):
        sums, norm = real(self, batch, step, weight)
        return sums, float("nan") if step == 1 else norm

    ZeroEngine._update = spoilt
    try:
        _train(recipe, ds)
    except UserError as error:
        return str(error)
    return "trained"


def test_a_gradient_that_is_no_number_is_never_saved(store, tmp_path):
    recipe = tiny_recipe(store, tmp_path / "run", save={"every": 1})
    said = run_ranks(2, _train_with_a_bad_gradient, recipe, tiny_json("zero1"))
    assert len(set(said)) == 1 and "step 2: the gradient norm is nan" in said[0]
    assert [path.name for path in (tmp_path / "run").glob("checkpoints/step-*")] == ["step-00000001"]


def test_validation_data_that_one_rank_cannot_read(store, tmp_path):
    recipe = tiny_recipe(store, tmp_path / "run", eval={"every": 1, "batches": 1})
    said = run_ranks(2, _evaluate_on_other_data, recipe, tiny_json("zero1"))
    assert len(set(said)) == 1 and "cannot be read" in said[0] and "(on rank 1)" in said[0]


def _evaluate_on_other_data(recipe: dict, ds: dict) -> str:
    from tests.tiny import _train
    from zeropipe.trainer.evaluation import evaluator

    def unreadable(*_):
        if int(os.environ["RANK"]) == 1:
            raise UserError("store: cannot be read")
        return []

    evaluator.evaluation_batches = unreadable
    try:
        _train(recipe, ds)
    except UserError as error:
        return str(error)
    return "trained"


# a rank whose disk fails at the eighth parameter that it reads, if it is the second
BAD_DISK = """
import os, sys
from zeropipe.trainer.commands.train import main
from zeropipe.trainer.modeling import values

real, reads = values.safe_open, []

def safe_open(file, framework):
    reads.append(file)
    if os.environ["RANK"] == "1" and len(reads) == 8:
        raise OSError(5, "Input/output error", str(file))
    return real(file, framework)

values.safe_open = safe_open
code = main(sys.argv[1:])
sys.stderr.flush()
os._exit(code)
"""


def _started_in(folders: list[str], arguments: list[str]) -> tuple[int, str]:
    os.chdir(folders[int(os.environ["RANK"])])
    return trainer(arguments)


def _two_processes(command: list[str], folders: list[Path]) -> list[tuple[int, str]]:
    """Exit code and words of each of two ranks, started as the launcher starts them."""
    place = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, folder in enumerate(folders)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    return [(rank.returncode, words) for rank, words in zip(ranks, said, strict=True)]


@pytest.fixture
def of_folder(store, tmp_path) -> list[str]:
    """The arguments of a run on two stages from `folder`, which each rank finds where it was started."""
    for host in ("first", "second"):
        folder_of_zeros(tmp_path / host / "folder", {**LLAMA, "vocab_size": 500})
    recipe = tiny_recipe(store, tmp_path / "run", parallel={"pipeline": 2})
    recipe["model"] = {"init": "folder"}
    recipe_file, json_file = write_pair(tmp_path, recipe, tiny_json("zero1"))
    return ["--run", str(recipe_file), "--deepspeed_config", str(json_file)]


def test_a_weight_that_one_stage_lacks_is_told_once_and_all_ranks_end_alike(of_folder, tmp_path):
    """Only the second stage's host lacks it, and only the second stage would read it."""
    from safetensors.numpy import load_file, save_file

    file, gone = tmp_path / "second/folder/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file({name: weight for name, weight in load_file(file).items() if name != gone}, file)
    folders = [tmp_path / "first", tmp_path / "second"]
    (first, said), (second, nothing) = run_ranks(2, _started_in, list(map(str, folders)), of_folder)
    assert (first, second) == (2, 2) and not nothing
    assert said.splitlines() == [
        f"error: model.init: folder holds no parameter {gone}; is it the same model family? (on rank 1)"
    ]


def test_what_one_stage_alone_meets_while_it_is_built_is_told_by_it_and_ends_the_others(of_folder, tmp_path):
    """The first stage waits for the second, whose disk fails."""
    folders = [tmp_path / "first", tmp_path / "second"]
    (first, lost), (second, said) = _two_processes(["-c", BAD_DISK, *of_folder], folders)
    assert (first, second) == (3, 2)
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert line.startswith("error: model.init: folder/model.safetensors: model.layers.")
    assert "cannot be read" in line and "Input/output error" in line and line.endswith("(on rank 1)")
    assert "rank 0 lost another rank" in lost
