"""What a rehearsal takes for wrong: each thing that a launch could do amiss, planted."""

import subprocess
import sys
from dataclasses import replace

import pytest

from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.cli import main
from zeropipe.launcher.rehearsal.drive import Outcome, other_launches
from zeropipe.launcher.rehearsal.faults import FAULTS
from zeropipe.launcher.rehearsal.matrix import Matrix, Rehearsed, write_line
from zeropipe.launcher.rehearsal.rank import Harm
from zeropipe.launcher.rehearse_command import chosen_faults

GOOD = Outcome(Harm("kill", 1, "step", 3, "/nowhere"), 7.0, 3, 0, "error: …", right=True)


@pytest.mark.parametrize(
    ("fault", "outcome", "wrong"),
    [
        ("kill", GOOD, ()),
        ("kill", replace(GOOD, seconds=None, code=None), ("did not end", "exit code None, expected 3")),
        ("kill", replace(GOOD, seconds=15.2), ("took more than 15 s",)),
        ("kill", replace(GOOD, code=0), ("exit code 0, expected 3",)),
        ("kill", replace(GOOD, left=2), ("2 processes left",)),
        ("kill", replace(GOOD, right=False), ("last line: error: …",)),
        ("pause", replace(GOOD, code=4, seconds=40.0), ()),
        ("pause", GOOD, ("exit code 3, expected 4",)),
        ("slot-mismatch", GOOD, ("exit code 3, expected 2",)),
        ("launcher-killed", replace(GOOD, code=-9), ()),
    ],
)
def test_what_is_not_as_it_must_be(tmp_path, fault, outcome, wrong):
    (tmp_path / "recipe.yaml").write_text("eval: {every: 0}\n")
    matrix = Matrix([], 1, tmp_path, seed=0)
    assert matrix._wrong(FAULTS[fault], outcome, tmp_path / "run") == wrong


def test_steps_that_no_checkpoint_holds_are_lost(tmp_path):
    (tmp_path / "recipe.yaml").write_text("eval: {every: 0}\n")
    (tmp_path / "run").mkdir()
    lines = "".join(f'{{"kind": "train", "step": {step}, "run": "a"}}\n' for step in range(1, 13))
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    assert Matrix([], 1, tmp_path, seed=0)._wrong(FAULTS["kill"], GOOD, tmp_path / "run") == ("12 steps are lost",)


def test_a_line_of_the_table():
    line = write_line(Rehearsed("kill", "step 4", 1, GOOD, ("took more than 15 s",)), as_json=False)
    assert line.split() == ["kill", "step", "4", "1", "7.0", "3", "0", "took", "more", "than", "15", "s"]


def test_without_what_makes_hosts_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("zeropipe.launcher.rehearsal.netns.what_is_missing", lambda: "not installed: pdsh")
    assert main(["rehearse", "demo", "--deepspeed_config", "zero2"]) == 2
    said = capsys.readouterr().err
    assert said == "error: rehearse makes hosts out of network namespaces: not installed: pdsh\n"


def test_faults_by_name():
    assert chosen_faults("kill, exit") == ["kill", "exit"]
    assert chosen_faults("all") == list(FAULTS)
    with pytest.raises(UserError, match=r"there is no 'kil'.*kill"):
        chosen_faults("kil")


def test_other_launches_of_this_environment_are_seen():
    """… which `deepspeed` would end with a rehearsed one; those of another Python are not its business."""
    words = ["-c", "import time; time.sleep(60)", "deepspeed.launcher.launch"]
    with subprocess.Popen([sys.executable, *words]) as mine, subprocess.Popen(["/usr/bin/env", "sleep", "60"]) as other:
        found = other_launches()
        mine.kill()
        other.kill()
    assert mine.pid in found
    assert other.pid not in found
