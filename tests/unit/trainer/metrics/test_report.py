"""The summary of a run, from records written by hand."""

import json
import math

from zeropipe.trainer.metrics.report import curve, evenly, report


def record(step: int, **extra) -> dict:
    base = {"kind": "train", "run": "a", "step": step, "loss": 10.0 - step / 10, "lr": 1e-3, "grad_norm": 1.0}
    rates = {"tokens": step * 100, "tokens_per_second": 200.0, "step_seconds": 0.5, "data_seconds": 0.05}
    return {**base, **rates, **extra}


def write(folder, records) -> None:
    start = {"kind": "event", "event": "start", "step": 0, "run": "a", "total_steps": 80}
    layout = {"layout": {"world": 4, "zero_stage": 3}, "hosts": [{"host": "x"}, {"host": "y"}]}
    lines = [json.dumps({**start, **layout}), *map(json.dumps, records)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def test_a_summary_on_one_screen(tmp_path):
    evals = [
        {"kind": "eval", "run": "a", "step": step, "split": "valid", "loss": loss, "perplexity": math.exp(loss)}
        for step, loss in ((20, 8.0), (40, 7.0), (60, 7.5))
    ]
    failed = {"kind": "event", "event": "failed", "step": 70, "run": "a", "error": "RuntimeError('x')"}
    write(tmp_path, [*(record(step) for step in range(1, 71)), *evals, failed])
    text = report(tmp_path)
    assert "step 70 of 80, 7,000 tokens" in text
    assert "median 200 tokens/s, 0.500 s a step, 10.0 % of it waiting for data; 35s in steps" in text
    assert "valid: best loss 7.0000 (perplexity 1096.63) at step 40" in text
    assert "4 ranks on 2 hosts, ZeRO-3, failed: RuntimeError('x')" in text
    assert len(text.splitlines()) < 40


def test_a_run_without_steps(tmp_path):
    write(tmp_path, [])
    assert "step 0 of 80" in report(tmp_path)


def test_the_curve_goes_from_high_to_low_and_marks_what_is_not_a_number():
    text = curve([record(step) for step in range(1, 61)])
    assert text.startswith("loss 9.900 to 4.000") and text.endswith("▁") and "█" in text and "!" not in text
    assert "!" in curve([record(1), record(2, loss=math.nan), record(3)])
    assert curve([record(1, loss=2.0)]) == "loss 2.000 to 2.000  ▁"


def test_evenly_keeps_both_ends():
    chosen = evenly([record(step) for step in range(1, 101)], 10)
    assert len(chosen) == 10 and chosen[0]["step"] == 1 and chosen[-1]["step"] == 100
    assert len(evenly([record(1), record(2)], 10)) == 2


def test_the_loads_of_experts(tmp_path):
    routed = {"router/load_entropy": 0.5, "router/load_max": 3.2, "router/unused": 2}
    last = {"router/load_entropy": 0.75, "router/load_max": 2.0, "router/unused": 1}
    shares = [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]
    write(tmp_path, [record(1, **routed), record(2, **last, **{"router/load": shares}), record(3, **last)])
    text = report(tmp_path)
    assert "experts: load entropy 0.500 to 0.750 of 1, largest load 3.20 to 2.00 of the mean, 1 of 8 unused" in text
    assert "  router 0: █▅▅▁  0.00 to 2.00 of the mean\n  router 1: ▅▅▅▅  1.00 to 1.00 of the mean" in text
