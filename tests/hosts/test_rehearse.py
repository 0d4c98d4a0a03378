"""`zeropipe rehearse`, the verb: a run goes through some faults, and the table says so; `scripts/faults.py` has all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.timeout(900)]
ZEROPIPE = str(Path(sys.executable).parent / "zeropipe")


def test_a_run_goes_through_faults(hosts, work):
    """On hosts that it makes itself: one fault that ends a launch, one that it survives, one that is refused."""
    command = [ZEROPIPE, "rehearse", "recipe.yaml", "--deepspeed_config", "zero2", "--json", "data.split=90,10,0"]
    done = subprocess.run(
        [*command, "--faults", "kill,sigterm-all,slot-mismatch"], cwd=work, capture_output=True, text=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["fault"], line["code"], line["wrong"]) for line in lines] == [
        ("kill", 3, []),
        ("sigterm-all", 4, []),
        ("slot-mismatch", 2, []),
    ], done.stdout + done.stderr
    assert done.returncode == 0
