"""Chatter is silenced, errors are not."""

import logging
import subprocess
import sys

import pytest

from zeropipe.trainer.run.quiet import hushed, quiet


def test_only_errors_pass(caplog, monkeypatch):
    quiet()
    quiet()
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.DEBUG)  # what the library does when it is imported after us
    monkeypatch.setattr(logger, "propagate", False)  # as the library does, or the handler would hear twice
    logger.addHandler(caplog.handler)
    try:
        logger.warning("chatter")
        logger.error("real")
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == ["real"]


def test_what_is_printed_is_caught_unless_it_explains_a_failure(capsys):
    with hushed() as caught:
        print("a table")
    assert caught.getvalue() == "a table\n" and capsys.readouterr().out == ""
    with pytest.raises(RuntimeError, match="planted"), hushed():
        _print_and_fail()
    assert capsys.readouterr().out == "the reason\n"


def _print_and_fail() -> None:
    print("the reason")
    raise RuntimeError("planted")


def test_importing_the_libraries_after_quiet_says_nothing():
    script = (
        "from zeropipe.trainer.run.quiet import quiet; quiet()\n"
        "import deepspeed, transformers, warnings\n"
        # which DeepSpeed's autotuner would load, in 1.6 s; who wants it finds it
        "import importlib.util, sys\n"
        "assert 'mlflow' not in sys.modules and importlib.util.find_spec('mlflow')\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10))\n"  # warns of its token ids
        "warnings.warn_explicit('chatter', UserWarning, 'x.py', 1, module='torch.nn.functional')\n"
        "warnings.warn('from our own code')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) <= 2 and "from our own code" in lines[0], lines
