"""A pool of processes that the distributed tests share.

Importing torch, deepspeed and megatron-core costs seconds: a server does it once (tests/preloaded.py) and forks the
processes, which run many cases. Each case gets a fresh gloo process group of its own size, and all module state of both
libraries is reset after it.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing as mp
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

CASES_PER_START = 10
"""The libraries keep the process groups of past cases, threads included: fresh processes are faster after so many."""


class WorkerError(AssertionError):
    """A case failed on some ranks; the message holds their tracebacks."""


class Workers:
    """`run(function, *args, world=n)` calls the function in n processes and returns their results in rank order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._cases = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, world: int, timeout: float = 240.0) -> list[Any]:
        if world > self.size:
            raise ValueError(f"a world of {world} in a pool of {self.size}")
        if self._cases == CASES_PER_START:
            self.close()
        if not self._processes:
            self._start()
            self._cases = 0
        self._cases += 1
        port = _free_port()
        for rank in range(world):
            self._pipes[rank].send((function, args, world, port, timeout))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting = {self._pipes[rank]: rank for rank in range(world)}
        while waiting:
            ready = wait(list(waiting), timeout=timeout)
            if not ready:
                errors.update(dict.fromkeys(waiting.values(), f"no answer within {timeout} s"))
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the process died"
                (results if ok else errors)[rank] = value
            if errors:
                # the others may wait for the failed rank for ever: give them a moment, then start afresh
                timeout = min(timeout, 5.0)
        if errors:
            self.close()
            raise WorkerError("\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(errors.items())))
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.preloaded"])
        for rank in range(self.size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _serve(rank: int, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    # ZeRO 3 formats every parameter at its start, for a log that is off
    torch.set_printoptions(threshold=0, edgeitems=1)
    # the libraries' chatter would drown the tests' own output; errors travel through the pipe
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    # as the command does; with ZeRO 3 these lines cost a tenth of a run
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    while True:
        try:
            function, args, world, port, timeout = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(timeout, exit=True)
        try:
            pipe.send((True, _run_case(rank, world, port, function, args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            faulthandler.cancel_dump_traceback_later()


def _run_case(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import deepspeed
    import torch.distributed as dist

    from megayoco.parallel.topology import destroy_topology

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    # as parallel/launch.py does: an op for inference that DeepSpeed would compile here
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    try:
        return function(*args)
    finally:
        destroy_topology()
        deepspeed.comm.comm.cdb = None
        _reset_zero3_numbering()
        dist.destroy_process_group()
        # engines refer to themselves; until they are collected, the threads of all their process groups live on
        gc.collect()


def _reset_zero3_numbering() -> None:
    """ZeRO 3 numbers modules and parameters per process and insists that all ranks agree; the ranks of a smaller world
    would be ahead of the others in the next case. DeepSpeed keeps one of the counters in a default argument."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0
    for default in DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ or ():
        if isinstance(default, list):
            default[:] = [0]
