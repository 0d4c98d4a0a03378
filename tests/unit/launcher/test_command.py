import os
import subprocess
import sys
from pathlib import Path

import pytest

from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.command import (
    Launch,
    deepspeed_command,
    deepspeed_program,
    forwarded_lines,
    rank_environment,
    remote_word,
)
from zeropipe.launcher.hosts.hostfile import Host

NASTY = [
    "plain=1",
    "",
    "two words",
    "a b 'single' \"double\" `id` $HOME \\n 100%",
    "$HOME",
    "`id`",
    "100%h",
    "a;b|c&d>e",
    "[1,2]",
    "{type: gpt2, n_layer: 2}",
    "x*?~!#",
    "it's",
    'say "hi"',
    "back\\slash",
    "tab\there",
    "ümlaut",
]


def arrives_as(words: list[str], tmp_path: Path) -> list[str]:
    """What a remote program gets, by DeepSpeed's quoting rule, pdsh's % rule and a real shell."""
    quoted = ['"{}"'.format(word.replace('"', '\\"')) if " " in word else word for word in words]
    line = " ".join(quoted).replace("%%", "%")
    show = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' {line}"
    import json

    return json.loads(
        subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    )


def test_words_reach_a_remote_rank_unchanged(tmp_path):
    assert arrives_as([remote_word(word) for word in NASTY], tmp_path) == NASTY


def test_unquoted_words_would_not(tmp_path):
    assert arrives_as(["$HOME", "two  words", "x=`id`"], tmp_path) != ["$HOME", "two  words", "x=`id`"]


def test_a_line_break_is_refused():
    with pytest.raises(UserError, match="line break"):
        remote_word("a\nb")


def test_one_machine():
    launch = Launch(("--run", "r.yaml", "data.seq_len=$8"), devices=2, master_port=29501)
    assert deepspeed_command(launch) == [
        deepspeed_program(), "--log_level", "critical", "--num_accelerators", "2", "--master_port", "29501",
        "--module", "zeropipe.trainer", "--run", "r.yaml", "data.seq_len=$8",
    ]  # fmt: skip


def test_some_devices_of_one_machine():
    launch = Launch(("--run", "r.yaml"), devices=2, device_ids=(3, 5), verbose=True)
    words = deepspeed_command(launch)[1:]
    assert words == ["--include", "localhost:3,5", "--module", "zeropipe.trainer", "--run", "r.yaml"]


def test_a_single_remote_host_is_not_mistaken_for_this_one():
    launch = Launch(("--run", "it's"), 2, Path("/h"), (Host("node1", 2),), ssh_port=2222, master_addr="10.0.0.1")
    words = deepspeed_command(launch)
    assert words[3:] == [
        "--hostfile", "/h", "--force_multi", "--no_ssh_check", "--enable_each_rank_log",
        "None --log_level critical", "--ssh_port", "2222", "--master_addr", "10.0.0.1",
        "--module", "zeropipe.trainer", "--run", "'it'\"'\"'s'",
    ]  # fmt: skip


def test_cpu_ranks_share_the_cores_and_what_the_user_set_stays():
    launch = Launch((), devices=4)
    added = rank_environment({"PYTHONWARNINGS": "default"}, launch, accelerators=0, cores=16)
    assert (added["OMP_NUM_THREADS"], added["DS_ACCELERATOR"]) == ("4", "cpu")
    assert "PYTHONWARNINGS" not in added
    assert rank_environment({}, launch, accelerators=0, cores=2)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in rank_environment({"OMP_NUM_THREADS": "3"}, launch, 0, 16)


def test_ranks_on_accelerators_keep_theirs():
    assert "DS_ACCELERATOR" not in rank_environment({}, Launch((), devices=4), accelerators=4, cores=16)


def test_the_environment_that_goes_to_other_hosts(tmp_path):
    mine = tmp_path / ".deepspeed_env"
    mine.write_text("# interfaces\n\nGLOO_SOCKET_IFNAME=eth1\nWHERE=$HOME/x\nA=$(id) `id`=%h\n")
    environ = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_VISIBLE_DEVICES": "0",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "FI_PROVIDER": "efa",
        "TRITON_CACHE_DIR": "/tmp/triton",
        "UCX_TLS": "tcp",
        "UCX_API_KEY": "secret",
        "OMP_NUM_THREADS": "2",
        "HF_TOKEN": "hf_secret",
        "WANDB_API_KEY": "secret",
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": "https://user:secret@mlflow.example",
        "MLFLOW_EXPERIMENT_NAME": "mine",
        "TRACKIO_SERVER_URL": "https://trackio.example/?write_token=secret",
        "HOME": "/root",
        "NCCL_DEBUG": 'a "$b" 5%',
        "PYTHONPATH": "x",
    }
    assert forwarded_lines(environ, [mine]) == [
        f"PATH={Path(sys.executable).parent}:$PATH",
        "CUDA_DEVICE_MAX_CONNECTIONS=1",
        "FI_PROVIDER=efa",
        "MLFLOW_EXPERIMENT_NAME=mine",
        'NCCL_DEBUG=a \\"\\$b\\" 5%%',
        "OMP_NUM_THREADS=2",
        "PYTORCH_ALLOC_CONF=expandable_segments:True",
        "TRITON_CACHE_DIR=/tmp/triton",
        "UCX_TLS=tcp",
        "WANDB_MODE=offline",
        "GLOO_SOCKET_IFNAME=eth1",
        "WHERE=\\$HOME/x",
        "A=\\$(id) \\`id\\`=%%h",
    ]


def test_a_bad_line_of_the_users_environment_file_is_named(tmp_path):
    mine = tmp_path / ".deepspeed_env"
    mine.write_text("A=1\nexport B=2\n")
    with pytest.raises(UserError, match=f"{mine}, line 2: expected NAME=VALUE"):
        forwarded_lines({}, [mine])
    mine.write_text("PATH=/opt/bin:$PATH\n")
    with pytest.raises(UserError, match=f"{mine}, line 1: nothing is expanded in it; write PATH out"):
        forwarded_lines({}, [mine])


def test_this_environment_has_its_own_deepspeed():
    found = deepspeed_program()
    assert found == "deepspeed" or os.access(found, os.X_OK)
