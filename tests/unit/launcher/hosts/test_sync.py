"""What is sent to which host, and that it arrives whole, at its path, with nobody's open file changed."""

import io
import tarfile
from pathlib import Path

import pytest

from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.doctor import quick
from zeropipe.launcher.doctor.case import Examination
from zeropipe.launcher.doctor.checks import Finding
from zeropipe.launcher.hosts import sync
from zeropipe.launcher.hosts.hostfile import Host


def test_each_host_gets_what_it_lacks(tmp_path):
    files = [str(tmp_path / name) for name in ("a.yaml", "b.json")]
    for name in files:
        Path(name).write_text(name)
    same = quick.probe.file_hash(Path(files[1]))
    found = Examination([Host(name, 1) for name in ("n1", "n2", "n3", "n4", "n5")])
    found.facts = {"n1": {"files": {files[0]: None, files[1]: same}}, "n3": {"files": {files[0]: "x", files[1]: "y"}}}
    found.findings = [
        Finding("files", "n1", "a.yaml is missing", ""),
        Finding("code", "n2", "differs", ""),
        Finding("files", "n3", "a.yaml differs", ""),
        Finding("files", "n3", "b.json differs", ""),
        Finding("folder", "n4", "there is no folder", ""),
        Finding("slots", "n5", "too many", ""),
    ]
    wanted = quick._behind(found, files)
    code = sync.own_code()
    assert set(wanted) == {"n1", "n2", "n3", "n4"}
    assert wanted["n1"] == [Path(files[0])]
    assert wanted["n2"] == code
    assert wanted["n3"] == [Path(name) for name in files]
    assert set(wanted["n4"]) == {*code, *map(Path, files)}
    assert {"trainer/loop.py", "recipes/demo.yaml"} <= {"/".join(path.parts[-2:]) for path in code}


def test_files_arrive(tmp_path, monkeypatch):
    """The remote command, run here, on files that are in somebody's hands."""
    file = tmp_path / "run.yaml"
    file.write_text("new")
    monkeypatch.setattr(sync, "ssh_command", lambda name, port, command: ["sh", "-c", command])
    archive = sync._archive([file])
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert tar.getnames() == [str(file).lstrip("/")]
    monkeypatch.setattr(sync, "_archive", lambda paths: archive)
    file.write_text("old")
    with file.open() as held:
        sync.send_files({"n1": [file]}, None)
        assert held.read() == "old"
    assert file.read_text() == "new"


def test_a_host_that_takes_nothing(monkeypatch):
    monkeypatch.setattr(sync, "ssh_command", lambda name, port, command: ["sh", "-c", "echo disk full >&2; exit 1"])
    with pytest.raises(UserError, match="n1: disk full"):
        sync.send_files({"n1": []}, None)
