"""Folders that appear whole or not at all, and the one lock."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from zeropipe.data_prep.durable import is_file_name, publish_folder, publishing
from zeropipe.data_prep.errors import UserError
from zeropipe.data_prep.lock import LockedError, lock_file


def folder_of(path: Path, text: str) -> Path:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text(text)
    return path


def text_in(path: Path) -> str:
    return (path / "inner" / "file").read_text()


def test_a_folder_takes_the_place_of_another(tmp_path):
    made, target = folder_of(tmp_path / "made", "new"), folder_of(tmp_path / "target", "old")
    publish_folder(made, target, tmp_path / "replaced")
    assert text_in(target) == "new" and os.listdir(tmp_path) == ["target"]


def test_what_cannot_be_put_in_place_leaves_what_was_there(tmp_path, monkeypatch):
    made, target, rename = folder_of(tmp_path / "made", "new"), folder_of(tmp_path / "target", "old"), Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path == made:
            raise OSError(errno.EIO, "planted")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="planted"):
        publish_folder(made, target, tmp_path / "replaced")
    assert text_in(target) == "old" and sorted(os.listdir(tmp_path)) == ["made", "target"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "; free some space"), (errno.EACCES, "; check its permissions, its owner and how it is mounted")],
)
def test_an_error_while_publishing_says_what_helps_and_leaves_nothing(tmp_path, number, advice):
    def fail() -> None:
        with publishing(tmp_path / "out", overwrite=False) as folder:
            folder_of(folder / "x", "new")
            raise OSError(number, os.strerror(number))

    with pytest.raises(UserError) as error:
        fail()
    assert str(error.value) == f"{tmp_path / 'out'}: {os.strerror(number)}{advice}"
    assert os.listdir(tmp_path) == []


def test_names_that_leave_the_folder():
    assert is_file_name("rank-00000.safetensors") and is_file_name("..a")
    assert not any(map(is_file_name, ("", ".", "..", "a/b", "../a", "/a", None, 3)))


def test_one_holder_at_a_time_who_is_named(tmp_path):
    lock = lock_file(tmp_path / "lock")
    with pytest.raises(LockedError) as error:
        lock_file(tmp_path / "lock")
    assert error.value.holder == (tmp_path / "lock").read_text().strip() == f"process {os.getpid()} on {os.uname()[1]}"
    lock.close()
    lock_file(tmp_path / "lock").close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_holds_nobody_back(tmp_path, monkeypatch, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock_file(tmp_path / "lock").close()


def test_another_failure_to_lock_is_told(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "planted")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="planted"):
        lock_file(tmp_path / "lock")
