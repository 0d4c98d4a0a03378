"""srun's and MPI's variables become torchrun's; Slurm's short forms are read as Slurm writes them."""

import pytest

from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.ranks import interface
from zeropipe.trainer.ranks.variables import adopt_variables, expand_nodelist, rank_number, tasks_per_node

SRUN = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "3,4", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[09-10]",
}  # fmt: skip


# as `scontrol show hostnames` prints them
@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("login", ["login"]),
        ("a1,b2", ["a1", "b2"]),
        ("gpu[01-03,7]-ib,login", ["gpu01-ib", "gpu02-ib", "gpu03-ib", "gpu7-ib", "login"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("r[1-2]n[08-09]", ["r1n08", "r1n09", "r2n08", "r2n09"]),
        ("node[099-101]", ["node099", "node100", "node101"]),
        ("dgx-a[1,3],dgx-b[2-3]", ["dgx-a1", "dgx-a3", "dgx-b2", "dgx-b3"]),
    ],
)
def test_lists_of_nodes(text, names):
    assert expand_nodelist(text) == names


@pytest.mark.parametrize("text", ["", "a,,b", "n[1-", "n1]", "n[3-1]", "n[a-b]", "n[[1]]", "n[]"])
def test_lists_that_are_none(text):
    with pytest.raises(UserError, match="list of nodes"):
        expand_nodelist(text)


def test_tasks():
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
    with pytest.raises(UserError, match="number of tasks"):
        tasks_per_node("4(y2)")


def test_srun():
    environ = dict(SRUN)
    adopt_variables(environ)
    wanted = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu09"}
    assert {name: environ[name] for name in wanted} == wanted
    other = {**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    adopt_variables(other)
    assert (other["MASTER_PORT"], other["LOCAL_SIZE"]) == (environ["MASTER_PORT"], "3")  # all ranks find one port
    third = {**SRUN, "SLURM_STEP_ID": "1"}
    adopt_variables(third)
    assert third["MASTER_PORT"] != environ["MASTER_PORT"]


def test_mpi_where_the_meeting_is_known():
    environ = {
        "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "20000",
    }  # fmt: skip
    adopt_variables(environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"], environ["LOCAL_SIZE"]) == (
        "1",
        "4",
        "1",
        "2",
    )


OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "gpu09", "MASTER_PORT": "20001",
}  # fmt: skip


def test_mpirun_in_an_allocation_of_slurm():
    """Its daemons are srun's tasks, whose numbers the ranks inherit; and srun with PMI sets a part of MPICH's."""
    environ = {**SRUN, **OPENMPI}
    assert rank_number(environ) == 2
    adopt_variables(environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_WORLD_SIZE"]) == ("2", "4", "2")
    environ = {**SRUN, "PMI_RANK": "5", "PMI_SIZE": "7"}
    assert rank_number(environ) == 5
    adopt_variables(environ)
    assert (environ["RANK"], environ["LOCAL_RANK"]) == ("5", "2")
    assert rank_number({}) == 0
    assert rank_number({"RANK": "3", **OPENMPI}) == 3


def test_a_batch_script_is_no_step_and_torchrun_comes_first():
    environ = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}
    adopt_variables(environ)
    assert "RANK" not in environ
    environ = {**SRUN, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    adopt_variables(environ)
    assert environ["RANK"] == "0"


def test_half_of_it_is_refused():
    with pytest.raises(UserError, match="RANK is set, but not MASTER_ADDR and MASTER_PORT"):
        adopt_variables({"RANK": "0", "WORLD_SIZE": "2"})
    adopt_variables({"RANK": "0", "WORLD_SIZE": "1"})
    with pytest.raises(UserError, match="SLURM_LOCALID"):
        adopt_variables({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"})


def test_own_address_and_interface():
    assert interface.own_address("127.0.0.1") == "127.0.0.1"
    assert interface.interface_of("127.0.0.1") == "lo"
    assert interface.own_address("no-such-host.invalid") is None
    assert interface.interface_of("203.0.113.7") is None


def test_one_host_is_left_alone():
    for local in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        environ = {"WORLD_SIZE": "2", local: "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere.invalid"}
        assert interface.set_interface(environ, interface.timedelta(seconds=1)) is None
        assert "GLOO_SOCKET_IFNAME" not in environ
