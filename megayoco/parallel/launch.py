"""From whichever launcher started this process to an initialised torch.distributed.

Understood: deepspeed, torchrun, Open MPI, MPICH / Intel MPI / PALS (PMI), MVAPICH2 and a Slurm job step. A process that
no launcher started is a world of one. mpi4py is never needed: what DeepSpeed would ask it for is set here.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

import torch

from megayoco.errors import UserError

DEFAULT_PORT = 29500
THREADS_VARIABLE = "MEGAYOCO_THREADS"


@dataclass(frozen=True)
class Launch:
    """Where this process stands among its peers, and where they meet."""

    launcher: str
    """Which group of variables was trusted; "none" for a process without launcher."""
    rank: int
    world_size: int
    local_rank: int
    """Number of this process on its machine."""
    local_size: int | None
    """Processes on this machine; None where the launcher does not say."""
    master_address: str
    master_port: int

    @property
    def inherits_terminal(self) -> bool:
        """Whether a terminal that this process sees is the user's; the processes of mpirun and srun see other ones."""
        return self.launcher in ("none", _GROUPS[0].launcher)


@dataclass(frozen=True)
class _Group:
    """The variables of one launcher; each entry lists synonyms, the first one set counts."""

    launcher: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    job: tuple[str, ...]
    """Variables that differ between two jobs on one machine; the port is derived from them."""


# In order of trust: mpirun and torchrun inside a Slurm job see Slurm's variables too, where SLURM_PROCID counts nodes.
_GROUPS = (
    _Group(
        "deepspeed or torchrun", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), ()
    ),
    _Group(
        "Open MPI",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Group(
        "MPICH or PMI",
        ("PMIX_RANK", "PMI_RANK"),
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS",),
        ("PMI_JOBID", "PALS_APID"),
    ),
    _Group(
        "MVAPICH2",
        ("MV2_COMM_WORLD_RANK",),
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
        (),
    ),
)


def read_launch(environ: Mapping[str, str]) -> Launch:
    """The place of this process, read from the environment; nothing is changed.

    Raises:
        UserError: a launcher's group of variables is half set or not a number, or several machines without MASTER_ADDR.
    """
    for group in _GROUPS:
        launch = _read_group(group, environ)
        if launch is not None:
            return launch
    return _read_slurm(environ) or Launch("none", 0, 1, 0, 1, "127.0.0.1", _port(environ, 0))


def _read_group(group: _Group, environ: Mapping[str, str]) -> Launch | None:
    rank = _integer(environ, group.rank)
    world_size = _integer(environ, group.world_size)
    if rank is None and world_size is None:
        return None
    names = (*group.rank, *group.world_size, *group.local_rank)
    if world_size is None and not environ.get(group.rank[-1]):
        return None  # PMIX_RANK alone: any PMIx library sets it, under Slurm too
    if rank is None and group is _GROUPS[0] and any(_integer(environ, other.rank) is not None for other in _GROUPS[1:]):
        return None  # the deepspeed launcher adds WORLD_SIZE to what MPICH and MVAPICH set
    if rank is None or world_size is None:
        raise _half_set(group.launcher, names, environ)
    local_rank = _integer(environ, group.local_rank)
    local_size = _integer(environ, group.local_size)
    if local_rank is None and group.launcher == "MPICH or PMI" and "SLURM_LOCALID" in environ:
        return None  # srun --mpi=pmi2 sets the ranks of PMI but not the local ones
    if local_rank is None:
        if world_size != 1 and local_size != 1:
            raise _half_set(group.launcher, names, environ)
        local_rank = 0
    job = next((environ[name] for name in group.job if environ.get(name)), None)
    address = _address(group.launcher, environ, world_size, local_size)
    port = _port(environ, _job_port(job))
    return _checked(Launch(group.launcher, rank, world_size, local_rank, local_size, address, port))


def _read_slurm(environ: Mapping[str, str]) -> Launch | None:
    # Without srun a script inside an allocation sees SLURM_NTASKS too, and would wait for ranks that never come.
    # 2^32 - 5 and 2^32 - 4 are the batch script and the step that adopts foreign processes.
    if environ.get("SLURM_STEP_ID") in (None, "", "batch", "extern", "4294967291", "4294967292"):
        return None
    rank = _integer(environ, ("SLURM_PROCID",))
    world_size = _integer(environ, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    local_rank = _integer(environ, ("SLURM_LOCALID",))
    if rank is None or world_size is None or local_rank is None:
        raise _half_set("Slurm", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_LOCALID"), environ)
    node = _integer(environ, ("SLURM_NODEID",)) or 0
    counts = expand_task_counts(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "")
    local_size = counts[node] if node < len(counts) else None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    address = environ.get("MASTER_ADDR") or (first_host(nodes) if nodes else "127.0.0.1" if len(counts) == 1 else None)
    if address is None:
        raise UserError(
            "Slurm names no nodes (SLURM_STEP_NODELIST, SLURM_JOB_NODELIST). Set MASTER_ADDR to the first host."
        )
    port = _port(environ, _job_port(f"{environ.get('SLURM_JOB_ID')}.{environ['SLURM_STEP_ID']}"))
    return _checked(Launch("Slurm", rank, world_size, local_rank, local_size, address, port))


def expand_task_counts(text: str) -> list[int]:
    """Tasks per node from Slurm's short form: "4(x2),1" is [4, 4, 1]; empty for what does not parse."""
    counts: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: "gpu[003-007,010],login1" is "gpu003"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],\-]+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError(f"The Slurm node list {nodes!r} cannot be read. Set MASTER_ADDR to the first host.")
    return "".join(part or "" for part in match.groups())


def _integer(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        text = environ.get(name)
        if text:
            try:
                return int(text)
            except ValueError:
                raise UserError(f"Environment variable {name} must be an integer, got {text!r}. Unset it.") from None
    return None


def _half_set(launcher: str, names: tuple[str, ...], environ: Mapping[str, str]) -> UserError:
    found = ", ".join(f"{name}={environ[name]}" if environ.get(name) else f"{name} not set" for name in names)
    return UserError(
        f"The environment of {launcher} is only half set: {found}. "
        "Start through deepspeed, torchrun, mpirun or srun, or unset these variables to run one process."
    )


def _address(launcher: str, environ: Mapping[str, str], world_size: int, local_size: int | None) -> str:
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    if world_size in (1, local_size):
        return "127.0.0.1"
    raise UserError(
        f"{launcher} started {world_size} processes and none was told where to meet. "
        "Set MASTER_ADDR to the host of rank 0 for all of them (mpirun: -x MASTER_ADDR=HOST)."
    )


def _port(environ: Mapping[str, str], default: int) -> int:
    port = _integer(environ, ("MASTER_PORT",))
    return default if port is None else port


def _job_port(job: str | None) -> int:
    """A port below the ephemeral range, the same on all ranks of a job; two jobs on a machine rarely share it."""
    return DEFAULT_PORT if job is None else 20000 + zlib.crc32(job.encode()) % 9000


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.world_size:
        raise UserError(
            f"{launch.launcher} numbers this process {launch.rank} of {launch.world_size}. "
            "Variables of two launchers are mixed: start from a clean environment."
        )
    return launch


def thread_count(launch: Launch, environ: Mapping[str, str]) -> int:
    """Threads of one process: its share of the machine, so that every launch line sums in the same order.

    OMP_NUM_THREADS is ignored on purpose: torchrun sets it, deepspeed and mpirun do not, and the number of threads
    changes the last digits. MEGAYOCO_THREADS overrides.
    """
    wanted = _integer(environ, (THREADS_VARIABLE,))
    if wanted is not None:
        if wanted < 1:
            raise UserError(f"{THREADS_VARIABLE} must be at least 1, got {wanted}.")
        return wanted
    return max(1, (os.cpu_count() or 1) // (launch.local_size or 1))


def choose_device(launch: Launch, environ: Mapping[str, str]) -> torch.device:
    """cuda:LOCAL_RANK where torch sees a GPU (unless DS_ACCELERATOR=cpu), else cpu. UserError for too few GPUs."""
    if environ.get("DS_ACCELERATOR", "cuda") != "cuda" or not torch.cuda.is_available():
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    if seen == 1 and launch.launcher == "Slurm" and "SLURM_STEP_GPUS" in environ:
        return torch.device("cuda", 0)  # srun --gpus-per-task shows every rank its own GPU as number 0
    if launch.local_rank >= seen:
        raise UserError(
            f"Local rank {launch.local_rank} has no GPU: this machine shows {seen}. "
            f"Start at most {seen} processes per machine, or set DS_ACCELERATOR=cpu to run without GPUs."
        )
    return torch.device("cuda", launch.local_rank)


def start_distributed(environ: MutableMapping[str, str] = os.environ) -> tuple[Launch, torch.device]:
    """Initialise torch.distributed (nccl on GPUs, gloo on CPUs) and this process's threads; gives its place and device.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT in `environ`. The world then exists until
    `stop_distributed`. A second call in one process only reads the place again.

    Raises:
        UserError: see `read_launch`, `thread_count` and `choose_device`.
    """
    launch = read_launch(environ)
    device = choose_device(launch, environ)
    if launch.world_size == 1 and launch.master_port == 0:
        launch = replace(launch, master_port=_free_port())
    if not torch.distributed.is_initialized():
        for name, value in (
            ("RANK", launch.rank),
            ("WORLD_SIZE", launch.world_size),
            ("LOCAL_RANK", launch.local_rank),
            ("MASTER_ADDR", launch.master_address),
            ("MASTER_PORT", launch.master_port),
        ):
            environ[name] = str(value)
        # DeepSpeed otherwise asks the machine again, and may find another answer than we did
        environ.setdefault("DS_ACCELERATOR", device.type)
        if device.type == "cuda":
            # without it cuBLAS may choose another order of summation from one run to the next
            environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.cuda.set_device(device)
        import deepspeed  # late: it reads DS_ACCELERATOR and takes seconds

        # an op for its inference engine that DeepSpeed would compile here, with a compiler that a user need not have
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
    if launch.local_size is None:
        hosts: list[str] = [""] * launch.world_size
        torch.distributed.all_gather_object(hosts, socket.gethostname())
        launch = replace(launch, local_size=hosts.count(socket.gethostname()))
    environ["LOCAL_SIZE"] = str(launch.local_size)
    torch.set_num_threads(thread_count(launch, environ))
    return launch, device


def stop_distributed() -> None:
    """Leave the world; does nothing outside one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
