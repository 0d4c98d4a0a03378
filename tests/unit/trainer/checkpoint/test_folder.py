"""The folder of checkpoints: what is newest, what is removed, what is refused."""

from pathlib import Path

import pytest

from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.checkpoint.files import write_bytes
from zeropipe.trainer.checkpoint.folder import (
    begin,
    check_same_run,
    clear_leftovers,
    inspect,
    ls,
    newest_checkpoint,
    prune,
    publish,
    step_folders,
    surplus,
    verify_checkpoints,
)


def _publish(folder: Path, step: int, content: bytes = b"weights") -> Path:
    partial = begin(folder, step)
    files = {name: write_bytes(partial / name, content) for name in ("rank-00000.safetensors", "state.json")}
    return publish(folder, step, files)


def _steps(paths: list[Path]) -> list[int]:
    return [int(path.name.rsplit("-", 1)[1]) for path in paths]


def _pruned(run: Path, keep: int) -> list[int]:
    doomed = surplus(run, keep)
    prune(doomed)
    return _steps(doomed)


@pytest.fixture
def run(tmp_path) -> Path:
    for step in (5, 10, 15):
        _publish(tmp_path / "checkpoints", step)
    return tmp_path


def test_a_published_checkpoint_is_whole_and_latest(run):
    folder = run / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000005", "step-00000010", "step-00000015"]
    assert (folder / "latest").read_text() == "step-00000015\n"
    assert [(item.step, item.sequence, item.nbytes, item.problem) for item in ls(run)] == [
        (5, 1, 14, None),
        (10, 2, 14, None),
        (15, 3, 14, None),
    ]
    assert verify_checkpoints(run) == {folder / f"step-{step:08d}": [] for step in (5, 10, 15)}


def test_a_run_directory_its_checkpoints_and_one_of_them_can_be_named(run, tmp_path):
    newest = run / "checkpoints" / "step-00000015"
    assert newest_checkpoint(run) == newest_checkpoint(run / "checkpoints") == newest_checkpoint(newest) == newest
    older = run / "checkpoints" / "step-00000005"
    assert newest_checkpoint(older) == older
    best = older.rename(tmp_path / "best")
    assert (newest_checkpoint(best), inspect(best).step) == (best, 5)


def test_newest_is_what_was_published_last(run):
    """A run that was resumed from step 5 goes on from its own step 7, not from the old step 15."""
    _publish(run / "checkpoints", 7)
    assert _steps(step_folders(run)) == [7, 15, 10, 5]
    assert _pruned(run, keep=2) == [5, 10]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000007\n"


def test_a_step_can_be_saved_again(run):
    _publish(run / "checkpoints", 10, b"other weights")
    assert _steps(step_folders(run)) == [10, 15, 5]
    assert (run / "checkpoints/step-00000010/state.json").read_bytes() == b"other weights"
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]


def test_pruning_keeps_the_newest_whole_ones_and_does_not_touch_damaged_ones(run):
    folder = run / "checkpoints"
    (folder / "step-00000005" / "state.json").unlink()
    (folder / "step-00000015" / "manifest.json").unlink()
    assert _pruned(run, keep=1) == []
    _publish(folder, 20)
    assert _pruned(run, keep=1) == [10]
    assert sorted(_steps(step_folders(run))) == [5, 15, 20]
    with pytest.raises(UserError, match="keep: 0 would remove the last checkpoint"):
        surplus(run, keep=0)


def test_find_passes_over_what_is_visibly_damaged_and_says_so_if_nothing_is_left(run):
    folder = run / "checkpoints"
    (folder / "step-00000015" / "manifest.json").unlink()
    assert newest_checkpoint(run) == folder / "step-00000010"
    for step in (5, 10):
        (folder / f"step-{step:08d}" / "state.json").write_bytes(b"short")
    with pytest.raises(UserError, match=r"no whole checkpoint here: .*step-00000015/manifest.json: missing; .*5 bytes"):
        newest_checkpoint(run)


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_find_refuses_a_place_without_checkpoints(tmp_path, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{place}: no checkpoint here"):
        newest_checkpoint(tmp_path / place)


def test_what_dead_runs_left_is_removed_and_a_replaced_checkpoint_comes_back(run):
    folder = run / "checkpoints"
    (folder / ".step-00000020.partial").mkdir()
    (folder / ".step-00000020.partial" / "rank-00000.safetensors").write_bytes(b"half")
    (folder / "step-00000010").rename(folder / ".step-00000010.replaced")  # killed between two renames
    (folder / ".step-00000005.replaced").mkdir()  # killed after both
    clear_leftovers(folder)
    assert _steps(step_folders(run)) == [15, 10, 5]
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert all(problems == [] for problems in verify_checkpoints(run).values())


def test_a_file_that_rank_0_does_not_see_is_refused(tmp_path):
    partial = begin(tmp_path, 1)
    files = {"rank-00000.safetensors": write_bytes(partial / "rank-00000.safetensors", b"here")}
    files["rank-00001.safetensors"] = files["rank-00000.safetensors"]
    with pytest.raises(
        UserError, match=r"does not see .*rank-00001.safetensors: missing.* must be shared by all hosts"
    ):
        publish(tmp_path, 1, files)
    assert step_folders(tmp_path) == []


def test_another_run_is_refused_with_every_difference():
    state = {"step": 40, "seed": 1, "seq_len": 512, "data": ["ab", "cd"], "model_config": {"n_layer": 2}}
    check_same_run(state, seed=1, seq_len=512, data=("ab", "cd"), model_config={"n_layer": 2})
    with pytest.raises(UserError) as error:
        check_same_run(state, seed=2, seq_len=512, data=["ab"], model_config={"n_layer": 2})
    text = str(error.value)
    assert "step 40" in text and "seed was 1, this run says 2" in text and 'data was ["ab", "cd"]' in text
    assert "seq_len" not in text and "model_config" not in text
