"""In CI a machine that cannot run a test must not pass for one that ran it: tests/conftest.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
SKIPS = """
import pytest

@pytest.mark.skipif(True, reason="no pdsh here")
def test_a(): pass

def test_b(): pytest.skip("later")

@pytest.mark.xfail(reason="known", strict=True)
def test_c(): assert False

def test_d(): pass
"""


@pytest.mark.parametrize(
    ("ci", "code", "counts"), [("true", 1, "1 failed, 1 passed, 1 xfailed, 1 error"), ("", 0, "1 passed, 2 skipped")]
)
def test_a_skipped_test_fails(tmp_path, ci, code, counts):
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_skips.py").write_text(SKIPS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", ".", "."],
        cwd=tmp_path, env={**os.environ, "CI": ci}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert counts in done.stdout
    assert done.returncode == code
    if ci:
        assert "no pdsh here\nIn CI every test must run" in done.stdout
