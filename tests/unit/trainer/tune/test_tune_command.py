"""The verb: what it prints, writes and refuses."""

import json
import shlex
import subprocess
import sys

import pytest

from tests.tiny import GPT2, tiny_json, tiny_recipe, tiny_store, write_pair
from zeropipe.launcher.cli import main


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    recipe = tiny_recipe(tiny_store(folder / "store"), folder / "run", model={"config": GPT2})
    return write_pair(folder, recipe, tiny_json("zero1", bf16={"enabled": True}))


def words(pair, *more):
    return ["tune", str(pair[0]), "--deepspeed_config", str(pair[1]), *more]


def test_writes_a_json_that_plan_takes(pair, tmp_path, capsys):
    file = tmp_path / "best.json"
    assert main(words(pair, "--devices", "8", "--gpu", "h100", "--top", "3", "-o", str(file))) == 0
    printed = capsys.readouterr().out
    assert "8 x h100 (1 node of 8)" in printed
    launch = next(line for line in printed.splitlines() if "zeropipe launch" in line)
    command = shlex.split(launch)
    assert command[3:5] == ["--deepspeed_config", str(file)]
    assert main(["plan", *command[2:]]) == 0
    assert main(words(pair, "--devices", "8", "--gpu", "h100", "-o", str(file))) == 2
    assert "is there already" in capsys.readouterr().err


def test_prints_json(pair, capsys):
    assert main(words(pair, "--nodes", "2", "--gpu", "a100", "--json", "--top", "2")) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["world"] == 16
    assert first["step_seconds"] <= second["step_seconds"]
    assert sum(first["seconds_of"].values()) == pytest.approx(first["step_seconds"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--gpu", "h100"], "--devices N is missing"),
        (["--gpu", "h1000", "--devices", "8"], "did you mean 'h100'"),
        (["--gpu", "h100", "--devices", "12"], "do not fill nodes of 8"),
        (["--gpu", "h100", "--devices", "8", "--nodes", "2"], "2 x 8 GPUs are 16"),
        (["--gpu", "h100", "--devices", "0"], "--devices 0: expected 1 or more"),
        (["--gpu", "h100", "--devices", "2", "--memory", "0.0001"], "no plan fits into"),
        (["--gpu", "h100", "--devices", "2", "--measure", "1"], "--measure runs here, on a machine without h100"),
        (["--devices", "2", "--network", "100"], "--network is for --gpu"),
        (["--gpu", "h100", "--devices", "2", "data.seq_len=4096"], "longer than the model takes"),
    ],
)
def test_refuses(pair, more, said, capsys):
    assert main(words(pair, *more)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_login_node_needs_no_torch(pair):
    """Where the accelerator is named, nothing is measured."""
    script = (
        "import sys; from zeropipe.launcher.cli import main; "
        f"assert main({words(pair, '--devices', '2', '--gpu', 'h100')!r}) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
