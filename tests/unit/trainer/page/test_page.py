"""What the page shows of a run, from records written by hand."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.unit.trainer.page.runs import MODEL, write_whole_run
from zeropipe.launcher.cli import main
from zeropipe.trainer.page.collect import collect
from zeropipe.trainer.page.decimate import kept, rounded


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
    assert list(figures) == ["loss", "perplexity", "lr", "grad_norm", "speed", "time", "memory", "wait", "mixture"]
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
    peak = [row for row in found["facts"] if row[0].startswith("MFU")]
    assert MODEL["n_embd"] == 64 and peak[0][2] == f"{100 * flops * 250 / 989e12:.1f}"
    rank = next(row for row in found["facts"] if row[0].startswith("TFLOP/s"))
    assert float(rank[2]) == pytest.approx(flops * 250 / 1e12, rel=5e-3)
    assert found["recipe"] == {"name": '"x"', "seed": "1", "optimizer.lr": "0.0003"}
    assert found["environment"]["host node1: NVIDIA H100 80GB HBM3"] == "2 ranks"


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
