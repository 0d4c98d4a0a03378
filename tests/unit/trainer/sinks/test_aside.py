"""A sink in a thread of its own: whatever it does, the run goes on at its pace, and what did not arrive is told."""

from __future__ import annotations

import sys
import time
from threading import Event
from typing import Any

import pytest

from tests.unit.trainer.metrics.test_record import open_log, take
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.sinks import aside, registry
from zeropipe.trainer.sinks.registry import SINKS, check_sink
from zeropipe.trainer.sinks.tensorboard import TensorBoard


class Odd:
    """Does what the test says when it is made, written to and closed."""

    made: list[Any]
    written: list[Any]
    closed: int

    def __init__(self, settings: Any) -> None:
        type(self).made.append(settings)
        self.do("make")

    def write(self, record: Any, message: Any) -> None:
        self.do("write")
        type(self).written.append(record)

    def close(self) -> None:
        type(self).closed += 1
        self.do("close")

    @staticmethod
    def do(what: str) -> None: ...


@pytest.fixture
def odd(monkeypatch):
    sink = type("Fresh", (Odd,), {"made": [], "written": [], "closed": 0})
    monkeypatch.setitem(SINKS._entries, "odd", sink)
    return sink


def run(tmp_path, steps: int = 30) -> float:
    """Seconds that the steps took."""
    with open_log(tmp_path, steps=steps, log={"every": 1, "sinks": ["odd"]}) as log:
        log.start("start", 0)
        begun = time.monotonic()
        take(log, 1, steps)
        took = time.monotonic() - begun
    assert not log.stop.asked
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(steps + 1))
    return took


def warnings(capfd) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]


def raising(when: str, error: BaseException):
    def do(what: str) -> None:
        if what == when:
            raise error

    return staticmethod(do)


@pytest.mark.parametrize("when", ["make", "write", "close"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("the service is gone"), "ConnectionError: the service is gone"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (SystemExit(1), "SystemExit: 1"),
    ],
    ids=["service", "disk", "exit"],
)
def test_one_that_raises_is_left_out_and_told_once(tmp_path, capfd, odd, when, error, said):
    odd.do = raising(when, error)
    run(tmp_path)
    assert warnings(capfd) == [f"warning: log.sinks: odd fails and is left out from here on: {said}"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_full_disk_under_tensorboard_is_told_once_and_ends_nothing(tmp_path, capfd, monkeypatch):
    class Full(TensorBoard):
        def __init__(self, settings: Any) -> None:
            super().__init__(settings)
            records = self._writer.file_writer.event_writer._async_writer._writer
            records._writer = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 (the sink closes it)

        def write(self, record: Any, message: Any) -> None:
            super().write(record, message)
            time.sleep(0.01)  # its thread writes

    monkeypatch.setitem(SINKS._entries, "odd", Full)
    run(tmp_path)
    assert warnings(capfd) == ["warning: log.sinks: odd fails and is left out from here on: No space left on device"]


def test_it_gets_every_record_in_order_and_hears_of_a_rewind(tmp_path, odd):
    with open_log(tmp_path, log={"every": 1, "sinks": ["odd"]}) as log:
        log.start("start", 0)
        take(log, 1, 5)
        log.start("rewind", 2)
        take(log, 3, 4)
    with open_log(tmp_path, log={"every": 1, "sinks": ["odd"]}) as log:
        log.start("resume", 4)
        take(log, 5, 6)
    assert [record["step"] for record in odd.written] == [0, 1, 2, 3, 4, 5, 2, 3, 4, 4, 5, 6]
    assert [settings.resumed_from for settings in odd.made] == [0, 2, 4] and odd.closed == 3
    assert len({settings.run for settings in odd.made}) == 3
    assert {settings.begun for settings in odd.made} == {odd.made[0].run}, "one run for a tracker"
    with open_log(tmp_path, log={"every": 1, "sinks": ["odd"]}) as log:
        log.start("start", 0)
    assert odd.made[-1].begun == odd.made[-1].run, "begun afresh: another one"


def test_one_that_blocks_delays_no_step_and_is_left_at_the_end(tmp_path, capfd, odd, monkeypatch):
    """As a tracker does that waits a minute for its server. 30 steps of which each waited would take half an hour."""
    never = Event()
    odd.do = staticmethod(lambda what: never.wait(60) if what == "write" else None)
    monkeypatch.setattr(aside, "PATIENCE", 0.2)
    took = run(tmp_path)
    assert took < 20
    assert warnings(capfd) == ["warning: log.sinks: odd is not done and is left; 30 records or more did not reach it"]
    never.set()


def test_a_full_queue_drops_counts_and_tells_once(tmp_path, capfd, odd, monkeypatch):
    go, begun = Event(), Event()

    def do(what: str) -> None:
        if what == "write":
            begun.set()
            go.wait(60)

    odd.do = staticmethod(do)
    monkeypatch.setattr(aside, "MOST_WAITING", 10)
    with open_log(tmp_path, steps=50, log={"every": 1, "sinks": ["odd"]}) as log:
        log.start("start", 0)
        assert begun.wait(60)
        take(log, 1, 30)
        assert warnings(capfd) == ["warning: log.sinks: odd is 10 records behind; it gets none until it has caught up"]
        go.set()
        while log._asides["odd"]._queue.qsize():
            time.sleep(0.01)
        take(log, 31, 40)
    assert warnings(capfd) == ["warning: log.sinks: odd did not get 20 records; metrics.jsonl has them all"]
    assert [record["step"] for record in odd.written] == [*range(11), *range(31, 41)]


def test_a_sink_whose_package_is_missing_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "alembic" else object())
    check_sink("tensorboard")
    check_sink("wandb")
    with pytest.raises(UserError) as refused:
        check_sink("mlflow")
    assert str(refused.value) == (
        f"log.sinks: mlflow needs alembic, which {sys.executable} has not: pip install 'zeropipe[mlflow]'"
    )
