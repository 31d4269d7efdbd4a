"""Every launcher's environment gives the same answer; a broken one is refused and says what was found."""

import pytest

from megayoco.errors import UserError
from megayoco.parallel.launch import expand_task_counts, first_host, read_launch, thread_count

TORCHRUN = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_ADDR="node0", MASTER_PORT="1234")
DEEPSPEED = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_SIZE="4", MASTER_ADDR="node0", MASTER_PORT="1234")
OPEN_MPI = dict(
    OMPI_COMM_WORLD_RANK="5",
    OMPI_COMM_WORLD_SIZE="8",
    OMPI_COMM_WORLD_LOCAL_RANK="1",
    OMPI_COMM_WORLD_LOCAL_SIZE="4",
    PMIX_RANK="5",
    MASTER_ADDR="node0",
    MASTER_PORT="1234",
)
HYDRA = dict(
    PMI_RANK="5", PMI_SIZE="8", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="4", MASTER_ADDR="node0", MASTER_PORT="1234"
)
PALS = dict(HYDRA, PMIX_RANK="5", PALS_LOCAL_RANKID="1")
DEEPSPEED_OVER_HYDRA = dict(HYDRA, WORLD_SIZE="8", LOCAL_SIZE="4")
MVAPICH = dict(
    MV2_COMM_WORLD_RANK="5",
    MV2_COMM_WORLD_SIZE="8",
    MV2_COMM_WORLD_LOCAL_RANK="1",
    MV2_COMM_WORLD_LOCAL_SIZE="4",
    MASTER_ADDR="node0",
    MASTER_PORT="1234",
)
SLURM = dict(
    SLURM_JOB_ID="77",
    SLURM_STEP_ID="0",
    SLURM_PROCID="5",
    SLURM_NTASKS="8",
    SLURM_LOCALID="1",
    SLURM_NODEID="1",
    SLURM_STEP_TASKS_PER_NODE="4(x2)",
    SLURM_STEP_NODELIST="node[0-1]",
    MASTER_PORT="1234",
)
SLURM_PMI2 = dict(SLURM, PMI_RANK="5", PMI_SIZE="8")
SLURM_PMIX = dict(SLURM, PMIX_RANK="5")
# mpirun inside an allocation: SLURM_PROCID counts nodes there and must not be believed
OPEN_MPI_IN_SLURM = dict(OPEN_MPI, SLURM_JOB_ID="77", SLURM_STEP_ID="0", SLURM_PROCID="1", SLURM_NTASKS="2")


LAUNCHERS = {
    "torchrun": TORCHRUN,
    "deepspeed": DEEPSPEED,
    "openmpi": OPEN_MPI,
    "hydra": HYDRA,
    "pals": PALS,
    "deepspeed-over-hydra": DEEPSPEED_OVER_HYDRA,
    "mvapich": MVAPICH,
    "slurm": SLURM,
    "slurm-pmi2": SLURM_PMI2,
    "slurm-pmix": SLURM_PMIX,
    "openmpi-in-slurm": OPEN_MPI_IN_SLURM,
}


@pytest.mark.parametrize("environ", LAUNCHERS.values(), ids=LAUNCHERS)
def test_every_launcher_gives_the_same_place(environ):
    launch = read_launch(environ)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_size) == (5, 8, 1, 4)
    assert (launch.master_address, launch.master_port) == ("node0", 1234)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        dict(SLURM_JOB_ID="77", SLURM_NTASKS="8", SLURM_JOB_NODELIST="node[0-1]"),  # allocation, no srun
        dict(SLURM, SLURM_STEP_ID="4294967291"),  # the batch script itself
        dict(PMIX_RANK="0"),
    ],
)
def test_a_process_without_launcher_is_a_world_of_one(environ):
    launch = read_launch(environ)
    assert (launch.launcher, launch.rank, launch.world_size, launch.local_rank) == ("none", 0, 1, 0)


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        (dict(RANK="0"), "WORLD_SIZE not set"),
        (dict(WORLD_SIZE="4"), "RANK not set"),
        (dict(RANK="1", WORLD_SIZE="4"), "LOCAL_RANK not set"),
        (dict(OMPI_COMM_WORLD_RANK="3"), "OMPI_COMM_WORLD_RANK=3"),
        (dict(PMI_RANK="3"), "PMI_SIZE not set"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID not set"),
        (dict(TORCHRUN, RANK="x"), "RANK must be an integer"),
        (dict(TORCHRUN, RANK="8"), "8 of 8"),
        ({k: v for k, v in OPEN_MPI.items() if k != "MASTER_ADDR"}, "-x MASTER_ADDR"),
    ],
)
def test_a_half_set_group_is_refused_with_what_was_found(environ, found):
    with pytest.raises(UserError, match=found):
        read_launch(environ)


def test_one_machine_needs_no_address_and_two_jobs_get_two_ports():
    one = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8", "PMIX_NAMESPACE": "prterun-host-1@1"}
    del one["MASTER_ADDR"], one["MASTER_PORT"]
    first, second = read_launch(one), read_launch({**one, "PMIX_NAMESPACE": "prterun-host-2@1"})
    assert first.master_address == "127.0.0.1"
    assert first.master_port == read_launch(one).master_port != second.master_port
    assert 1024 < first.master_port < 32768


def test_threads_do_not_depend_on_the_launcher(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 10)
    counts = {thread_count(read_launch(e), dict(e, OMP_NUM_THREADS="1")) for e in LAUNCHERS.values()}
    assert counts == {2}
    assert thread_count(read_launch(TORCHRUN), dict(MEGAYOCO_THREADS="7")) == 7
    with pytest.raises(UserError, match="MEGAYOCO_THREADS"):
        thread_count(read_launch(TORCHRUN), dict(MEGAYOCO_THREADS="0"))


def test_slurm_short_forms():
    assert expand_task_counts("4(x2),1") == [4, 4, 1]
    assert expand_task_counts("") == expand_task_counts("four") == []
    assert [first_host(n) for n in ("a", "a,b", "gpu[003-007,010],x", "n[1,2]-ib")] == ["a", "a", "gpu003", "n1-ib"]
