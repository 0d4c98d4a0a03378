import time
from pathlib import Path

import pytest

from zeropipe.data_prep.errors import UserError
from zeropipe.launcher import cli, launch_command, running
from zeropipe.launcher.hosts.devices import count_accelerators, visible_devices
from zeropipe.launcher.hosts.hostfile import Host
from zeropipe.trainer.keeper.wire import LAUNCH_FOLDER


def planned(monkeypatch, *words: str, accelerators: int = 0, visible: str = "") -> launch_command.Launch:
    """The launch that a command line comes to on a machine with so many accelerators."""
    monkeypatch.setattr(launch_command, "count_accelerators", lambda: accelerators)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return launch_command.plan_launch(cli.parse_command(["launch", *words]))


@pytest.fixture
def hostfile(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostfile"
    path.write_text("node1 slots=2\nnode2 slots=3\n")
    return path


def test_one_rank_on_cpus_and_all_accelerators_otherwise(monkeypatch):
    assert planned(monkeypatch, "demo").devices == 1
    assert planned(monkeypatch, "demo", accelerators=4).devices == 4
    assert planned(monkeypatch, "demo", "--num_accelerators", "3").devices == 3
    assert planned(monkeypatch, "demo", "--devices", "2", accelerators=4).device_ids is None


def test_only_visible_devices_are_used(monkeypatch):
    launch = planned(monkeypatch, "demo", accelerators=8, visible="6,3,1")
    assert (launch.devices, launch.device_ids) == (3, (6, 3, 1))
    assert planned(monkeypatch, "demo", "--devices", "2", accelerators=8, visible="6,3,1").device_ids == (6, 3)


@pytest.mark.parametrize(("words", "says"), [(["--devices", "0"], "1 or more"), (["--devices", "5"], "offers 4")])
def test_devices_that_are_not_there(monkeypatch, words, says):
    with pytest.raises(UserError, match=says):
        planned(monkeypatch, "demo", *words, accelerators=4)


def test_devices_by_uuid_are_refused():
    with pytest.raises(UserError, match="numbers only"):
        visible_devices({"CUDA_VISIBLE_DEVICES": "GPU-5a3b"})
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "2, 3"}) == [2, 3]
    assert visible_devices({}) is None


def test_accelerators_are_counted_by_their_device_files(tmp_path):
    assert count_accelerators(tmp_path) == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert count_accelerators(tmp_path) == 2
    amd = tmp_path / "amd"
    (amd / "dri").mkdir(parents=True)
    for name in ("kfd", "dri/renderD128", "dri/renderD129", "dri/card0"):
        (amd / name).touch()
    assert count_accelerators(amd) == 2


def test_two_launches_on_one_machine_use_two_ports(monkeypatch):
    ports = {planned(monkeypatch, "demo").master_port for _ in range(4)}
    assert len(ports) > 1
    assert planned(monkeypatch, "demo", "--master_port", "12345").master_port == 12345


def test_a_hostfile_decides_the_number_of_ranks(monkeypatch, hostfile):
    launch = planned(monkeypatch, "demo", "--hostfile", "hostfile", "--ssh_port", "2222", "data.seq_len=64")
    assert launch.hosts == (Host("node1", 2), Host("node2", 3))
    assert (launch.devices, launch.hostfile, launch.ssh_port) == (5, hostfile, 2222)
    assert launch.arguments == ("--run", "demo", "--deepspeed_config", "zero0", "data.seq_len=64")
    with pytest.raises(UserError, match="--devices 4, but hostfile has 5 slots"):
        planned(monkeypatch, "demo", "--hostfile", "hostfile", "--devices", "4")


def test_a_hostfile_of_this_machine_alone_needs_no_ssh(monkeypatch, hostfile):
    hostfile.write_text("localhost slots=2\n")
    launch = planned(monkeypatch, "demo", "--hostfile", "hostfile")
    assert (launch.remote, launch.devices) == (False, 2)


def test_files_are_named_by_their_full_path(monkeypatch, hostfile):
    recipe = hostfile.parent / "my.yaml"
    recipe.touch()
    launch = planned(monkeypatch, "my.yaml", "--deepspeed_config", "zero2")
    assert launch.arguments == ("--run", str(recipe), "--deepspeed_config", "zero2")


def test_what_cannot_run_is_refused_before_anything_is_started(tmp_path, monkeypatch, capsys):
    """The store of this recipe is missing: the plan says so, and no launch is ever made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch_command, "run_once", lambda *_: pytest.fail("started"))
    before = time.monotonic()
    assert cli.main(["launch", "demo", "--deepspeed_config", "demo", "--devices", "2"]) == 2
    assert time.monotonic() - before < 5
    assert "data/demo" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_launch_goes_with_it(tmp_path):
    output = tmp_path / "runs" / "new"
    with running.launch_folder(output) as folder:
        assert folder.parent == output
    assert not (tmp_path / "runs").exists()
    with running.launch_folder(output):
        (output / "metrics.jsonl").touch()
    assert [path.name for path in output.iterdir()] == ["metrics.jsonl"]


def test_the_environment_of_a_launch(monkeypatch, hostfile, tmp_path):
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("LOCAL_RANK", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    launch = planned(monkeypatch, "demo", "--hostfile", "hostfile")
    environment = running.child_environment(launch, tmp_path)
    assert environment[LAUNCH_FOLDER] == str(tmp_path)
    assert not {"RANK", "LOCAL_RANK"} & set(environment)
    assert "BatchMode=yes" in environment["PDSH_SSH_ARGS_APPEND"]
    carried = Path(environment["DS_ENV_FILE"]).read_text().splitlines()
    assert f"{LAUNCH_FOLDER}={tmp_path}" in carried
    assert "OMP_NUM_THREADS=1" in carried


def test_visible_devices_are_said_once(monkeypatch, tmp_path):
    launch = planned(monkeypatch, "demo", accelerators=8, visible="6,3")
    assert "CUDA_VISIBLE_DEVICES" not in running.child_environment(launch, tmp_path)
