"""DeepSpeed's launchers of other hosts: what is composed is held against its own parser and runners."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zeropipe.data_prep.errors import UserError
from zeropipe.launcher import backends, cli, launch_command, running
from zeropipe.launcher.backends import check_programs, check_variables
from zeropipe.launcher.command import Launch, deepspeed_command
from zeropipe.launcher.run_module import __file__ as run_module

TWO = "node1 slots=2\nnode2 slots=2\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(launch_command, "count_accelerators", lambda: 0)
    monkeypatch.setattr(running, "count_accelerators", lambda: 0)
    Path("hostfile").write_text(TWO)


def launched(*words: str) -> Launch:
    args = cli.parse_command(["launch", "demo", "--hostfile", "hostfile", *words])
    launch_command._check_ways(args)
    return launch_command.plan_launch(args)


def started(launch: Launch, folder: Path) -> list[str]:
    """The command that DeepSpeed's own runner for the launcher makes of ours, in this environment."""
    from dataclasses import replace

    from deepspeed.launcher import runner

    launch = replace(running._with_hostfile(launch, folder), master_addr="10.0.0.1", master_port=20000)
    environment = running.child_environment(launch, folder)
    words = deepspeed_command(launch, running.sent_by_name(launch, environment))
    args = runner.parse_args(words[1:])
    pool = runner.fetch_hostfile(args.hostfile)
    active = runner.parse_inclusion_exclusion(pool, args.include, args.exclude)
    made = runner.LAUNCHER_CLASSES[args.launcher](args, runner.encode_world_info(active), pool)
    for variable in environment:
        if variable.startswith(tuple(runner.EXPORT_ENVS)):
            made.add_export(variable, environment[variable])
    return made.get_cmd(environment, active)


def test_openmpi(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "7 $s")
    monkeypatch.setenv("HF_TOKEN", "s3cr3t")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cr3t")  # DeepSpeed sends all of MLFLOW*
    Path(".deepspeed_env").write_text("MINE=$(id) 5%h\n")
    words = started(launched("--launcher", "openmpi", "optimizer.lr=it's"), tmp_path)
    assert words[:5] == ["mpirun", "-n", "4", "-hostfile", str(tmp_path / "hostfile")]
    sent = [words[i + 1] for i, word in enumerate(words) if word == "-x"]
    assert {"HF_HUB_ETAG_TIMEOUT", "MINE", "PATH", "MASTER_ADDR", "MASTER_PORT", "ZEROPIPE_LAUNCH"} < set(sent)
    assert "HF_TOKEN" not in sent and "s3cr3t" not in " ".join(words)
    at = words.index("--bind-to")
    assert words[at + 1] == "none"
    assert words[words.index(sys.executable) :] == [
        sys.executable, "-u", "-m", "zeropipe.trainer", "--run", "demo", "--deepspeed_config", "zero0",
        "optimizer.lr=it's",
    ]  # fmt: skip
    environment = running.child_environment(launched("--launcher", "openmpi"), tmp_path)
    assert environment["MINE"] == "$(id) 5%h"
    assert environment["PATH"].startswith(f"{Path(sys.executable).parent}:")
    assert environment["DS_ENV_FILE"] == os.devnull


def test_mpich(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    launch = launched("--launcher", "mpich", "--launcher_args", "-iface eth1")
    words = started(launch, tmp_path)
    assert words[:7] == ["mpirun", "-n", "4", "-ppn", "2", "-iface", "eth1"]
    assert words[words.index("-hosts") + 1] == "node1,node2"
    assert words[words.index("MASTER_ADDR") + 1] == "10.0.0.1"
    helper = next(i for i, word in enumerate(words) if word.endswith("launcher_helper.py"))
    assert Path(words[helper]).is_file()
    assert words[helper - 2 : helper] == [sys.executable, "-u"]
    assert words[helper + 1 :] == [
        "--launcher", "mpich", run_module, "zeropipe.trainer", "--run", "demo", "--deepspeed_config", "zero0",
    ]  # fmt: skip
    assert "CUDA_VISIBLE_DEVICES" not in running.child_environment(launch, tmp_path)


def test_slurm(tmp_path):
    """srun is told the hosts; where rank 0 is, the ranks find out from what Slurm tells them."""
    Path("hostfile").write_text(TWO + "node3 slots=2\n")
    launch = launched("--launcher", "slurm", "--exclude", "node2")
    words = started(launch, tmp_path)
    assert words[:5] == ["srun", "-n", "4", "--nodes=2", "--ntasks-per-node=2"]
    assert words[5:7] == ["--nodelist=node1,node3", "--kill-on-bad-exit=1"]
    assert words[7].startswith("--export=ALL")
    assert words[8:] == [
        sys.executable, "-u", run_module, "zeropipe.trainer", "--run", "demo", "--deepspeed_config", "zero0",
    ]  # fmt: skip
    assert not {"MASTER_ADDR", "DS_ACCELERATOR"} & set(running.child_environment(launch, tmp_path))


def test_a_module_is_run_from_a_file(tmp_path):
    """As `python -m` does: its arguments, its name, and the current folder first on the path."""
    (tmp_path / "shows.py").write_text("import sys\nprint(__name__, sys.argv[1:], sys.path[0])\n")
    done = subprocess.run([sys.executable, run_module, "shows", "-a", "b c"], capture_output=True, text=True)
    assert done.stdout == f"__main__ ['-a', 'b c'] {tmp_path}\n", done.stderr


def test_no_ssh():
    """Each host starts its own part; ranks are numbered over all hosts."""
    from deepspeed.launcher import runner

    launch = launched("--no_ssh", "--node_rank", "1")
    assert (launch.remote, launch.devices, launch.ranks) == (False, 4, range(2, 4))
    args = runner.parse_args(deepspeed_command(launch)[1:])
    assert (args.no_ssh, args.node_rank, args.master_addr, args.master_port) == (True, 1, "node1", 29500)
    assert args.user_args == ["--run", "demo", "--deepspeed_config", "zero0"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--launcher", "openmpi", "--ssh_port", "22"], "write `Port 22` into ~/.ssh/config"),
        (["--launcher", "openmpi", "--include", "node1:1"], "cannot choose devices"),
        (["--launcher", "openmpi", "--bind_cores_to_rank"], "of this machine"),
        (["--launcher", "mpich", "--exclude", "node2:1"], "as many ranks on every host"),
        (["--launcher", "slurm", "--exclude", "node2:1"], "as many ranks on every host"),
        (["--launcher", "pdsh", "--no_ssh"], "leave --launcher out"),
        (["--launcher", "openmpi", "--via", "srun"], "leave --launcher and --no_ssh out"),
        (["--no_ssh"], "say --node_rank N"),
        (["--no_ssh", "--node_rank", "2"], "numbered 0 to 1"),
        (["--no_ssh", "--max-restarts", "1"], "nobody sees all hosts"),
        (["--node_rank", "1"], "goes with --no_ssh"),
    ],
)
def test_what_cannot_be_done_is_refused(words, says):
    with pytest.raises(UserError, match=says):
        launched(*words)


def test_a_launcher_without_hosts_is_refused():
    for option in ("--launcher=openmpi", "--no_ssh"):
        with pytest.raises(UserError, match="which hosts are there"):
            launch_command._check_ways(cli.parse_command(["launch", "demo", option]))


def test_an_unknown_launcher_is_refused():
    with pytest.raises(UserError, match="openmpi"):
        cli.parse_command(["launch", "demo", "--launcher", "mpi"])


def test_values_that_deepspeed_would_change_are_refused():
    check_variables("openmpi", {"NCCL_IB_HCA": "mlx5_0,mlx5_1", "MINE": "a b"})
    with pytest.raises(UserError, match="NCCL_IB_HCA=mlx5_0,mlx5_1"):
        check_variables("slurm", {"NCCL_IB_HCA": "mlx5_0,mlx5_1"})
    with pytest.raises(UserError, match="PYTHONPATH=/my code"):
        check_variables("mpich", {"PYTHONPATH": "/my code"})


def test_programs_that_are_not_here(monkeypatch, tmp_path):
    monkeypatch.setattr(backends.shutil, "which", lambda program: None)
    with pytest.raises(UserError, match="needs ssh and srun and sinfo here: apt-get install slurm-client"):
        check_programs("slurm")
    monkeypatch.undo()
    (tmp_path / "mpirun").write_text("#!/bin/sh\necho Intel MPI\n")
    (tmp_path / "mpirun").chmod(0o755)
    for name in ("ssh", "ompi_info"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert shutil.which("mpirun") == str(tmp_path / "mpirun")
    with pytest.raises(UserError, match="says 'Intel MPI'"):
        check_programs("openmpi")


def test_the_printed_line_can_be_pasted(monkeypatch, capsys):
    monkeypatch.setattr(launch_command, "meeting", lambda launch, *_: launch)
    monkeypatch.setattr(launch_command, "check_programs", lambda _: None)
    launch_command.print_dry_run(launched("--launcher", "openmpi", "--launcher_args", "--mca a b"))
    *comments, line = capsys.readouterr().out.splitlines()
    assert comments == ["# with this hostfile:", "#   node1 slots=2", "#   node2 slots=2"]
    words = shlex.split(line)
    assert f"DS_ENV_FILE={os.devnull}" in words
    (told,) = [word for word in words if word.startswith("--launcher_args=")]
    assert told.endswith(" --mca a b")
