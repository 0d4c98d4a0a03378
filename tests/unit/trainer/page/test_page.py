"""What the page shows of a run, from records written by hand."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.tiny import plan_of, tiny_json, tiny_recipe, tiny_store, write_pair
from tests.unit.trainer.page.runs import MODEL, write_whole_run
from zeropipe.launcher.cli import main
from zeropipe.trainer.page.collect import collect
from zeropipe.trainer.page.decimate import kept, rounded
from zeropipe.trainer.page.page import ALL_POINTS, points_of, write_page
from zeropipe.trainer.tune.cost import predict
from zeropipe.trainer.tune.hardware import DEVICES
from zeropipe.trainer.tune.search import training_of


def test_a_long_series_keeps_its_ends_and_extremes():
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000)
    values[[12_345, 67_890]] = 50.0, -50.0
    values[40_000:40_003] = np.nan
    chosen = kept(values, 1000)
    assert len(chosen) <= 1000 and (np.diff(chosen) > 0).all()
    assert {0, 99_999, 12_345, 67_890, 40_000} <= set(chosen.tolist())
    for part in np.array_split(np.arange(100_000), 332):  # an independent look at the stretches in the middle
        own = values[part[20:-20]]
        near = chosen[(chosen >= part[0] - 320) & (chosen <= part[-1] + 320)]
        assert np.nanmax(values[near]) >= np.nanmax(own) and np.nanmin(values[near]) <= np.nanmin(own)
    assert kept(values[:7], 1000).tolist() == list(range(7))
    assert rounded(np.array([1.23456789, np.nan, np.inf, 1e-9])) == [1.2346, None, None, 1e-9]


def test_a_run_as_the_page_shows_it(tmp_path):
    found = collect(write_whole_run(tmp_path / "run", 100), 60)
    figures = {figure["key"]: figure for figure in found["figures"]}
    keys = ["loss", "perplexity", "lr", "grad_norm", "speed", "time", "memory", "wait", "mfu", "mixture"]
    assert list(figures) == keys
    loss, valid = figures["loss"]["lines"]
    assert (loss["label"], valid["label"], valid["x"]) == ("train", "valid", list(range(10, 101, 10)))
    assert loss["y"][loss["x"].index(37)] == 99.0 and len(loss["x"]) <= 60  # the spike is still there
    assert [line["y"] for line in figures["mixture"]["lines"]] == [[75.0] * 10, [25.0] * 10]
    assert figures["wait"]["lines"][0]["y"][0] == 10.0 and figures["memory"]["lines"][1]["y"] == [3.0] * 20
    assert found["clock"]["tokens"][-1] == 25_000 and found["clock"]["hours"][-1] == pytest.approx(100 * 0.5 / 3600)
    assert {kind: len(marks) for kind, marks in found["marks"].items()} == {"save": 10, "resume": 1, "skip": 1}
    facts = {row[0]: row[1:] for row in found["facts"]}
    assert facts["steps"] == ["100", "100"] and facts["GiB of the largest rank"] == ["1.00", "1.00"]
    # 6 N + 12 L d T by hand: N without the embeddings, which are the head, too
    weights = 2 * 12 * 64 * 64 + 512 * 64
    flops = 6 * weights + 12 * 2 * 64 * 32
    (mfu,) = figures["mfu"]["lines"]
    assert mfu["y"][0] == pytest.approx(100 * flops * 250 / 989e12, rel=1e-4)
    peak = [row for row in found["facts"] if row[0].startswith("MFU")]
    assert MODEL["n_embd"] == 64 and peak[0][2] == f"{100 * flops * 250 / 989e12:.1f}"
    rank = next(row for row in found["facts"] if row[0].startswith("TFLOP/s"))
    assert float(rank[2]) == pytest.approx(flops * 250 / 1e12, rel=5e-3)
    assert found["recipe"] == {"name": '"x"', "seed": "1", "optimizer.lr": "0.0003"}
    assert found["environment"]["host node1: NVIDIA H100 80GB HBM3"] == "2 ranks"


def test_a_step_is_planned_where_the_device_is_known(tmp_path):
    run, store = write_whole_run(tmp_path / "run", 10), tiny_store(tmp_path / "store")
    recipe, ds = tiny_recipe(store, run), tiny_json("zero1")
    write_pair(run, recipe, ds)
    (run / "ds.json").rename(run / "deepspeed.json")
    planned = predict(training_of(plan := plan_of(recipe, ds, 2)), plan.layout, plan.settings, DEVICES["h100"])
    rows = {row[0]: row[1:] for row in collect(run, 100)["facts"]}
    assert rows["seconds of a step, median"] == [f"{planned.seconds:.3g}", "0.5"]
    text = (run / "metrics.jsonl").read_text().replace("NVIDIA H100 80GB HBM3", "cpu")
    (run / "metrics.jsonl").write_text(text)
    shown = collect(run, 100)
    rows = {row[0]: row[1:] for row in shown["facts"]}
    assert rows["seconds of a step, median"][0] == "not known"
    assert rows["MFU, % of the peak"][1] == "not known: the peak of cpu is not among those of zeropipe tune"
    assert "mfu" not in {figure["key"] for figure in shown["figures"]}


def test_what_many_long_runs_come_to_is_bounded(tmp_path):
    """What a browser has to read and draw does not grow with the steps; what stands out in a run stays."""
    runs = [write_whole_run(tmp_path / str(number), 2000, 1e-4 * (number + 1)) for number in range(10)]
    size = write_page(runs, tmp_path / "page.html")
    figures: dict[str, list[int]] = {}
    for run in runs:
        shown = collect(run, points_of(len(runs)))
        assert 99.0 in shown["figures"][0]["lines"][0]["y"]
        for figure in shown["figures"]:
            figures.setdefault(figure["key"], []).extend(len(line["x"]) for line in figure["lines"])
    assert len(figures["time"]) == 20 and max(figures["loss"]) > 300  # of 2,000
    assert all(sum(lengths) <= ALL_POINTS for lengths in figures.values())
    assert size < 1_000_000  # 0.7 MB at 2,000 steps and at 100,000 (benchmarks/page.py)


def test_the_page_holds_all_it_needs_and_nothing_that_runs_out_of_it(tmp_path, capsys):
    runs = [str(write_whole_run(tmp_path / name, 50, rate)) for name, rate in (("one", 3e-4), ("two", 1e-4))]
    page = tmp_path / "out" / "page.html"
    assert main(["report", *runs, "--html", str(page)]) == 0
    text = page.read_text()
    assert len(text) < 3_000_000 and "uPlot" in text and "default-src 'none'" in text
    assert not re.search(r"(?:src|href)=[\"'](?!#)", text.partition('id="data">')[0]), "fetches something"
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data and [run["name"] for run in json.loads(data[1])["runs"]] == ["one", "two"]
    assert json.loads(data[1])["runs"][0]["answers"][0]["answers"][0]["answer"] == "</script><b>A"
    capsys.readouterr()
    assert main(["report", *runs]) == 0 and capsys.readouterr().out.count("process groups:") == 2
    assert main(["report", str(tmp_path), "--html", str(page)]) == 2
    assert "expected the record of a run here" in capsys.readouterr().err
