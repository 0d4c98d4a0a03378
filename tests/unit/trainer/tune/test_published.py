"""Predictions against utilisation that others have published; nothing was fitted on these runs."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[4] / "benchmarks" / "published_runs.py"


@pytest.fixture(scope="module")
def runs():
    spec = importlib.util.spec_from_file_location("published_runs", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    "name", ["GPT 1.7B", "GPT 18.4B", "GPT 39.1B", "scores recomputed", "BLOOM", "405B, 8192 x", "OLMo 2"]
)
def test_within_fifteen_per_cent(runs, name):
    [run] = [run for run in runs.PUBLISHED if name in run.name]
    found, _, _ = run.predict()
    assert abs(found / run.utilisation - 1) <= runs.TOLERANCE
