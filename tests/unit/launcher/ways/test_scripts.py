"""What is printed for others to start: read back by those who would read it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from zeropipe.data_prep.errors import UserError
from zeropipe.launcher import cli
from zeropipe.launcher.hosts.hostfile import Host
from zeropipe.launcher.ways.scripts import Start, written_for
from zeropipe.trainer.commands.train import parse_rank

ROOT = Path(__file__).parents[4]
WORDS = ["my recipe.yaml", "--deepspeed_config", "zero2", "name=it's", "output=/s/$HOME/`x`"]
START = Start("My run", WORDS, (Host("n1", 4), Host("n2", 4)), {"NCCL_DEBUG": "INFO $x"}, gpu=True)
# of Kubeflow Trainer 2.3 (kubeflow-trainer-api, TrainerV1alpha1TrainJob): what is required, and of which type
TRAIN_JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "trainer.kubeflow.org/v1alpha1"},
        "kind": {"const": "TrainJob"},
        "metadata": {"properties": {"name": {"pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$"}}},
        "spec": {
            "required": ["runtimeRef"],
            "additionalProperties": False,
            "properties": {
                "runtimeRef": {"required": ["name"]},
                "runtimePatches": {  # podTemplateOverrides until Trainer 2.2
                    "type": "array",
                    "items": {
                        "required": ["manager"],
                        "properties": {"trainingRuntimeSpec": {"required": ["template"]}},
                    },
                },
                "trainer": {
                    "additionalProperties": False,
                    "properties": {
                        "image": {"type": "string"},
                        "numNodes": {"type": "integer"},
                        "numProcPerNode": {"type": ["integer", "string"]},
                        "command": {"type": "array", "items": {"type": "string"}},
                        "env": {"type": "array", "items": {"required": ["name", "value"]}},
                        "resourcesPerNode": {"type": "object"},
                    },
                },
            },
        },
    },
}


def shown(folder: Path, script: str, program: str) -> list[list[str]]:
    """Runs a script in a shell where `program` prints the words it gets; those of each call."""
    stand_in = folder / Path(program).name
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@" --END-- "NCCL_DEBUG=$NCCL_DEBUG"\n')
    stand_in.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    script = script.replace(str(Path(sys.executable).parent / "torchrun"), "torchrun")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={"PATH": path, "HOME": "/h"})
    assert done.returncode == 0, done.stderr
    calls = done.stdout.split("--END--\nNCCL_DEBUG=INFO $x\n")
    assert calls.pop() == ""
    return [call.splitlines() for call in calls]


def rank_of(words: list[str]) -> tuple[str, list[str]]:
    """Recipe and overrides that a rank understands."""
    args = parse_rank(words)
    return args.recipe, args.overrides


def test_an_sbatch_script(tmp_path):
    script = written_for("srun", START)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.M))
    assert (directives["nodes"], directives["ntasks-per-node"]) == ("2", "4")
    assert directives["gpus-per-node"] == "4"
    assert "gpus-per-node" not in written_for("srun", Start("x", WORDS, START.hosts, {}, gpu=False))
    (words,) = shown(tmp_path, script, "srun")
    assert words[:4] == ["--kill-on-bad-exit=1", sys.executable, "-m", "zeropipe.trainer"]
    assert rank_of(words[4:]) == ("my recipe.yaml", ["name=it's", "output=/s/$HOME/`x`"])


def test_lines_for_torchrun(tmp_path):
    """torchrun's own parser reads them: no word of ours is taken for one of its options."""
    from torch.distributed.run import get_args_parser

    calls = shown(tmp_path, written_for("torchrun", START), "torchrun")
    assert len(calls) == 2
    for number, words in enumerate(calls):
        args = get_args_parser().parse_args(words)
        assert (args.nnodes, args.nproc_per_node, args.node_rank, args.master_addr) == ("2", "4", number, "n1")
        assert args.module
        assert args.training_script == "zeropipe.trainer"
        assert rank_of(args.training_script_args) == ("my recipe.yaml", ["name=it's", "output=/s/$HOME/`x`"])


def test_a_train_job(tmp_path):
    job = yaml.safe_load(written_for("kubeflow", START))
    jsonschema.validate(job, TRAIN_JOB)
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 4}}
    assert job["metadata"]["name"] == "my-run"
    (words,) = shown(tmp_path, f"export NCCL_DEBUG='INFO $x'; {shlex.join(trainer['command'])}", "torchrun")
    assert words[:2] == ["-m", "zeropipe.trainer"]
    assert rank_of(words[2:])[0] == "my recipe.yaml"


def test_hosts_that_differ():
    uneven = Start("x", WORDS, (Host("n1", 4), Host("n2", 2)), {}, gpu=True)
    for way in ("srun", "kubeflow"):
        with pytest.raises(UserError, match=r"\[2, 4\] slots"):
            written_for(way, uneven)
    assert "--nproc-per-node 2" in written_for("torchrun", uneven)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--via", "srun"], "add --dry-run"),
        (["--via", "srun", "--dry-run"], "--nodes N --devices M"),
        (["--via", "srun", "--dry-run", "--nodes", "0", "--devices", "2"], "--nodes N"),
        (["--via", "srun", "--dry-run", "--nodes", "-1", "--devices", "2"], "1 or more"),
        (["--via", "kubeflow", "--dry-run", "--nodes", "2", "--devices", "1"], "data/demo"),
    ],
)
def test_what_cannot_be_printed(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["launch", "demo", *words]) == 2
    assert says in capsys.readouterr().err


def test_the_examples_start_the_trainer(tmp_path):
    """Their commands, run in a shell with the variables that SkyPilot and dstack set, by torchrun's own parser."""
    from torch.distributed.run import get_args_parser

    (tmp_path / "zeropipe" / "bin").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "zeropipe" / "bin"):
        (folder / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        (folder / "torchrun").chmod(0o755)
    sky = yaml.safe_load((ROOT / "examples" / "skypilot.yaml").read_text())
    dstack = yaml.safe_load((ROOT / "examples" / "zeropipe.dstack.yml").read_text())
    assert (sky["num_nodes"], dstack["nodes"], dstack["type"]) == (2, 2, "task")
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8", "DSTACK_NODES_NUM": "2", "DSTACK_GPUS_PER_NODE": "8",
        "DSTACK_NODE_RANK": "1", "DSTACK_MASTER_NODE_IP": "10.0.0.1",
    }  # fmt: skip
    for script in (sky["run"], dstack["commands"][-1]):
        done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        args = get_args_parser().parse_args(done.stdout.splitlines())
        assert (args.nnodes, args.nproc_per_node, args.node_rank, args.master_addr) == ("2", "8", 1, "10.0.0.1")
        assert rank_of(args.training_script_args) == ("gpt2_345m", ["output=/shared/runs/gpt2-345m"])


def test_the_image_holds_what_the_wheel_needs():
    copied = [word for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY")
              for word in line.split()[1:-1]]  # fmt: skip
    assert all((ROOT / name).exists() for name in copied)
    needed = {
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "data_prep",
        "trainer",
        "launcher",
        "ds_configs",
        "recipes",
    }
    assert needed <= set(copied)
