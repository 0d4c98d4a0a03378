"""What a launch makes of what the keepers tell: no rank hangs while another one is stopped by a signal."""

import time
from types import SimpleNamespace

import pytest

from zeropipe.launcher.supervision.verdict import tell
from zeropipe.launcher.supervision.watch import FROZEN_SECONDS, Mishap, Patience, Watch
from zeropipe.trainer.keeper.pulse import PHASES, STEP

PATIENCE = Patience(least=5.0)


def pulse(quiet: float, frozen: float = 0.0) -> dict:
    longest = [1.0 if phase == STEP else 0.0 for phase in PHASES]
    return {"phase": STEP, "step": 7, "quiet": quiet, "frozen": frozen, "longest": longest}


@pytest.fixture
def watch(tmp_path):
    watch = Watch(tmp_path, range(2), False, PATIENCE)
    for member in watch.members:
        member.host, member.began = f"node{member.rank}", time.monotonic()
        watch.board.lines[member.rank] = SimpleNamespace(closed=False, heard=time.monotonic(), close=lambda: None)
    yield watch
    watch.board.close()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_the_cause_and_nobody_hangs(watch, stopped):
    """Both have been quiet for longer than the limit before the one is taken to be stopped for good."""
    for member in watch.members:
        member.pulse = pulse(5.5, frozen=5.5 if member.rank == stopped else 0.0)
    assert watch.look() == []
    watch.members[stopped].pulse = pulse(6.1, frozen=FROZEN_SECONDS + 0.1)
    mishaps = watch.look()
    assert [(mishap.kind, mishap.rank) for mishap in mishaps] == [("frozen", stopped)]
    assert tell(watch, mishaps).startswith(f"error: rank {stopped} on node{stopped} was stopped by a signal (SIGSTOP)")


def test_a_rank_that_hangs_is_told_with_the_limit_that_it_had(watch):
    for member in watch.members:
        member.pulse = pulse(5.5)
    mishaps = watch.look()
    watch.members[0].pulse["longest"] = [20.0] * len(PHASES)  # a step that took long has ended meanwhile
    assert {mishap.kind for mishap in mishaps} == {"hung"}
    assert "nothing for 6 s, where 5 s are the limit" in tell(watch, mishaps)


@pytest.mark.parametrize(
    ("said", "looks"),
    [
        (
            "RuntimeError: Gloo connectFullMesh failed with …",
            "the ports between all hosts, both ways",
        ),
        ("OSError: [Errno 28] No space left on device: 'runs/x'", "room and locks of shared folders (--shared FOLDER)"),
        ("ModuleNotFoundError: No module named 'zstandard'", "versions and code of all hosts"),
        ("ValueError: too many values to unpack", None),
    ],
)
def test_what_the_doctor_looks_at_is_said_before_the_cause(watch, said, looks):
    watch.members[1].end = {"code": 1, "text": f"Traceback …\n{said}\n", "phase": STEP, "step": 3}
    *before, last = tell(watch, [Mishap("ended", 1, "step 4")]).splitlines()
    assert last == f"error: rank 1 on node1 failed: {said}, in step 4"
    assert before[-1].startswith(f"zeropipe doctor --hostfile HOSTFILE: looks at {looks}") == bool(looks)
    assert any("zeropipe doctor" in line for line in before) == bool(looks)
