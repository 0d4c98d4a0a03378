"""In CI a machine that cannot run a test must not pass for one that ran it, and the list of what is left to
`make verify` names tests that there are: tests/conftest.py.
"""

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


def run_pytest(folder, listed: str, words: list[str], ci: str = "") -> subprocess.CompletedProcess[str]:
    """Over the tests above, with that list beside the conftest."""
    shutil.copy(CONFTEST, folder)
    (folder / "verify_only.txt").write_text(f"# left to make verify\n{listed}")
    (folder / "test_skips.py").write_text(SKIPS)
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = .\nmarkers = slow\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", *words],
        cwd=folder, env={**os.environ, "CI": ci}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ci", "code", "counts"), [("true", 1, "1 failed, 1 passed, 1 xfailed, 1 error"), ("", 0, "1 passed, 2 skipped")]
)
def test_a_skipped_test_fails(tmp_path, ci, code, counts):
    done = run_pytest(tmp_path, "", ["-c", os.devnull, "."], ci)
    assert counts in done.stdout
    assert done.returncode == code
    if ci:
        assert "no pdsh here\nIn CI every test must run" in done.stdout


def test_what_is_listed_is_slow(tmp_path):
    done = run_pytest(tmp_path, "test_skips.py::test_d\n", ["-m", "not slow"])
    assert "2 skipped, 1 deselected, 1 xfailed" in done.stdout


def test_a_listed_test_that_is_gone(tmp_path):
    listed = "test_skips.py::test_gone\n"
    done = run_pytest(tmp_path, listed, [])
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "verify_only.txt: there is no test test_skips.py::test_gone" in done.stderr
    assert run_pytest(tmp_path, listed, ["test_skips.py"]).returncode == 0  # of a part, who can tell
