"""The ledger's audit: holds over resumes and changes of world size, and sees every planted defect."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_json, train_on_ranks
from tests.unit.trainer.runs import CONFIGS, make_store, run_recipe
from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.cli import main
from zeropipe.trainer.data.ledger import digest, sample_ids
from zeropipe.trainer.data.order import SampleOrder, Source
from zeropipe.trainer.metrics.audit import audit, audit_text, check_records
from zeropipe.trainer.metrics.reading import read_lines, read_metrics

BATCH = 6


@pytest.fixture(scope="module")
def order() -> SampleOrder:
    return SampleOrder([Source("a", 50, 0.7), Source("b", 20, 0.3)], seed=5)


def records_of(order: SampleOrder, steps: int, run: str = "a", first: int = 0) -> list[dict]:
    layout = {"world": 1}
    event = {"kind": "event", "event": "start" if first == 0 else "resume", "step": first, "run": run}
    records: list[dict] = [{**event, "total_steps": 20, "layout": layout}]
    for step in range(first, steps):
        positions = np.arange(step * BATCH, (step + 1) * BATCH)
        value = digest(positions, sample_ids(*order.sample(positions)))
        samples = [int(positions[0]), int(positions[-1]) + 1]
        records.append({"kind": "train", "step": step + 1, "run": run, "samples": samples, "ledger": f"{value:016x}"})
    return records


def test_a_sound_record_holds(order):
    found = check_records(records_of(order, 20), order)
    assert found.defects == [] and found.steps == 20 and found.samples == 120
    assert found.per_source == [84, 36]  # 0.7 and 0.3 of 120, over more than one epoch of each
    assert "finished: 20 of 20 steps" in audit_text(found)


def test_an_unfinished_run_is_called_so(order):
    assert "not finished: 7 of 20 steps" in audit_text(check_records(records_of(order, 7), order))


def plant(records: list[dict], defect: str) -> list[dict]:
    records = copy.deepcopy(records)
    step = records[8]  # step 8: samples 42 to 47
    if defect == "a step is missing":
        del records[8]
    elif defect == "a step is recorded twice":
        records.insert(9, copy.deepcopy(step))
    elif defect == "a batch is skipped":
        for record in records[8:]:
            record["samples"] = [place + BATCH for place in record["samples"]]
    elif defect == "a batch is read again":
        for record in records[8:]:
            record["samples"] = [place - BATCH for place in record["samples"]]
    elif defect == "a step consumes nothing":
        step["samples"] = [42, 42]
    elif defect == "two steps change places":
        records[8]["ledger"], records[9]["ledger"] = records[9]["ledger"], records[8]["ledger"]
    elif defect == "one bit of a ledger":
        step["ledger"] = f"{int(step['ledger'], 16) ^ 1:016x}"
    return records


@pytest.mark.parametrize(
    ("defect", "expected"),
    [
        ("a step is missing", "step 9 follows step 7; step 9 begins at sample 48, expected 42: 6 skipped"),
        (
            "a step is recorded twice",
            "step 8 follows step 8; step 8 begins at sample 42, expected 48: 6 consumed twice",
        ),
        ("a batch is skipped", "step 8 begins at sample 48, expected 42: 6 skipped"),
        ("a batch is read again", "step 8 begins at sample 36, expected 42: 6 consumed twice"),
        ("a step consumes nothing", r"step 8 consumed no sample: \[42, 42\)"),
        ("two steps change places", r"step 8: ledger [0-9a-f]{16}, but samples \[42, 48\).*; step 9: ledger"),
        ("one bit of a ledger", r"step 8: ledger [0-9a-f]{16}, but samples \[42, 48\) give [0-9a-f]{16}"),
    ],
)
def test_every_planted_defect_is_seen(order, defect, expected):
    sound = records_of(order, 20)
    assert check_records(sound, order).defects == []
    with pytest.raises(UserError, match=expected):
        audit_text(check_records(plant(sound, defect), order))


def test_samples_of_another_order_are_seen(order):
    """A run with another seed, or whose ranks drew one wrong sample, gives other digests."""
    other = SampleOrder(order.sources, seed=6)
    defects = check_records(records_of(other, 20), order).defects
    assert len(defects) == 20
    positions = np.arange(6)
    sources, samples = order.sample(positions)
    samples[2] = (samples[2] + 1) % 20
    records = records_of(order, 20)
    records[1]["ledger"] = f"{digest(positions, sample_ids(sources, samples)):016x}"
    assert len(check_records(records, order).defects) == 1


def test_chunks_do_not_change_the_verdict(order, monkeypatch):
    monkeypatch.setattr("zeropipe.trainer.metrics.audit.CHUNK", 10)
    assert check_records(records_of(order, 20), order).defects == []
    assert len(check_records(plant(records_of(order, 20), "one bit of a ledger"), order).defects) == 1


@pytest.fixture(scope="module")
def resumed_run(text_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks to step 5 of which step 3 was saved last, as after a kill; then one rank, to step 6."""
    run = tmp_path_factory.mktemp("audit") / "run"
    recipe = run_recipe(text_store, run, CONFIGS["gpt2"], eval={"every": 0}, duration={"steps": 5})
    train_on_ranks(2, recipe, tiny_json("zero1"))
    last = run / "checkpoints" / "step-00000005"
    last.rename(run / "lost")
    recipe["duration"] = {"steps": 6}
    train_on_ranks(1, recipe, tiny_json("zero2", micro=4))
    return run


@pytest.mark.distributed
def test_a_run_with_a_resume_and_another_world_size(resumed_run, capsys):
    assert [record["step"] for record in read_lines(resumed_run) if record["kind"] == "train"] == [
        1,
        2,
        3,
        4,
        5,
        4,
        5,
        6,
    ]
    found = audit(resumed_run)
    assert found.defects == [] and found.worlds == [1, 2] and found.resumes == 1 and found.process_groups == 2
    assert main(["ckpt", "audit", str(resumed_run)]) == 0
    out = capsys.readouterr().out
    assert "finished: 6 of 6 steps" in out and "samples 0 to 47" in out
    # what the dead process group did at steps 4 and 5 was done again, the same
    ledgers = [(record["step"], record["ledger"]) for record in read_lines(resumed_run) if record["kind"] == "train"]
    assert ledgers[3:5] == ledgers[5:7]


@pytest.mark.distributed
def test_an_edited_record_is_seen(resumed_run, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "environment.json"):
        (run / name).write_text((resumed_run / name).read_text())
    lines = (resumed_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    place = max(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "train")
    (run / "metrics.jsonl").write_text("".join(lines[:place] + lines[place + 1 :]))
    (run / "checkpoints").symlink_to(resumed_run / "checkpoints")
    assert main(["ckpt", "audit", str(run)]) == 2
    assert "step-00000006 says 48 samples at step 6" in capsys.readouterr().err


@pytest.mark.distributed
def test_a_changed_store_is_refused(resumed_run, text_store, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(resumed_run / "checkpoints")
    (run / "metrics.jsonl").write_text((resumed_run / "metrics.jsonl").read_text())
    other = make_store(tmp_path / "store", documents=15)
    (run / "recipe.yaml").write_text((resumed_run / "recipe.yaml").read_text().replace(str(text_store), str(other)))
    assert main(["ckpt", "audit", str(run)]) == 2
    assert "stores have changed" in capsys.readouterr().err


def test_nothing_to_audit(tmp_path, capsys):
    assert main(["ckpt", "audit", str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err


@pytest.mark.distributed
def test_the_report_of_a_resumed_run(resumed_run, capsys):
    assert main(["report", str(resumed_run)]) == 0
    out = capsys.readouterr().out
    assert "step 6 of 6" in out and "start at step 0, to step 5, 2 ranks on 1 host, ZeRO-1" in out
    assert "resume at step 3, to step 6, 1 ranks on 1 host, ZeRO-2" in out
    first = next(record for record in read_metrics(resumed_run) if record["kind"] == "train")
    assert f"{first['loss']:.4f}" in out
