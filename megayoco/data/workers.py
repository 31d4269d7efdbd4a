"""Processes that encode chunks, and give the results back in the order of the input.

A pipe and a thread of the parent belong to each process: it hands over a chunk and waits, so a process that dies is
known at once, with the chunk it had. Nothing is queued between processes, and what is under way is bounded in bytes.
"""

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from megayoco.data.chunks import CHUNK_BYTES, Chunk
from megayoco.data.encode import Result, Task, encode_chunk
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError


class Encoder:
    """`with Encoder(task, tokenizer, workers) as encode: for chunk, result in encode(chunks): ...`

    The chunks come back without their content. With one worker everything happens in this process. Enter it before
    files are opened that a worker should not hold, and before threads are started, which makes starting cheaper.

    Raises (while iterating):
        UserError: a record that cannot be used, unless `task.skip`; a process that died.
        RuntimeError: a bug in a worker, with its traceback and the place in the input.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, workers: int):
        self._task, self._tokenizer, self._count = task, tokenizer, workers
        self._processes: list[tuple[BaseProcess, Connection]] = []
        self._threads: ThreadPoolExecutor | None = None
        self._idle: queue.SimpleQueue[tuple[BaseProcess, Connection]] = queue.SimpleQueue()

    def __enter__(self) -> "Encoder":
        # one process is one core: an engine with threads of its own would take the others' cores
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if self._count > 1:
            # Ctrl-C goes to every process of the terminal; the workers leave it to the parent
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                for _ in range(self._count):
                    self._start_worker()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._threads = ThreadPoolExecutor(self._count)
        return self

    def _start_worker(self) -> None:
        # A fork has everything imported and built, but also copies the locks of other threads in whatever state they
        # are: only while there are none. macOS does not promise that its libraries survive one.
        fork = sys.platform == "linux" and threading.active_count() == 1
        context: Any = get_context("fork" if fork else "spawn")
        ours, theirs = context.Pipe()
        # a copy of a parent's end would keep the pipe open when the parent is killed
        inherited = (self._tokenizer, [ours, *(other for _, other in self._processes)]) if fork else (None, [])
        process = context.Process(target=_serve, args=(theirs, self._task, *inherited), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of numpy's threads, which expect forks
            process.start()
        theirs.close()
        self._processes.append((process, ours))
        self._idle.put((process, ours))

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for process, _ in self._processes:
            process.kill()  # they hold nothing that must be finished; a waiting thread gets an end of file
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for process, connection in self._processes:
            connection.close()
            process.join()
        self._processes.clear()

    def __call__(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, Result]]:
        if self._threads is None:
            for chunk in chunks:
                result = self._encode_here(chunk)
                yield chunk, result
            return
        waiting: deque[tuple[Chunk, Future[Result]]] = deque()
        under_way = 0
        for chunk in chunks:
            while waiting and (
                under_way + chunk.size > 2 * self._count * CHUNK_BYTES or len(waiting) >= 2 * self._count
            ):
                done, future = waiting.popleft()
                yield done, future.result()
                under_way -= done.size
            waiting.append((replace(chunk, content=None), self._threads.submit(self._encode_there, chunk)))
            under_way += chunk.size
            del chunk
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()

    def _encode_here(self, chunk: Chunk) -> Result:
        try:
            return encode_chunk(chunk, self._task, self._tokenizer)
        except (UserError, KeyboardInterrupt):
            raise
        except MemoryError as error:
            raise UserError(f"{chunk.place}: memory ran out. {_LESS_MEMORY}") from error
        except BaseException as error:  # engines in Rust raise panics that are no Exception
            raise RuntimeError(f"{chunk.place}: {type(error).__name__}: {error}") from error

    def _encode_there(self, chunk: Chunk) -> Result:
        process, connection = worker = self._idle.get()
        content = chunk.take()
        packed = content if isinstance(content, bytes) else pickle.dumps(content, protocol=5)
        head = replace(chunk, content=b"" if isinstance(content, bytes) else None)
        del content
        try:
            connection.send(head)
            connection.send_bytes(packed)
            del packed
            answer = connection.recv()
        except (EOFError, OSError):
            process.join(1)
            raise UserError(
                f"{head.place}: a worker process died (exit code {process.exitcode}), most often because memory ran"
                f" out. {_LESS_MEMORY}"
            ) from None
        finally:
            self._idle.put(worker)  # a dead one too: whoever takes it fails at once instead of waiting for ever
        if isinstance(answer, Result):
            return answer
        kind, message = answer
        if kind == "user":
            raise UserError(message)
        if kind == "memory":
            raise UserError(f"{head.place}: memory ran out. {_LESS_MEMORY}")
        raise RuntimeError(f"{head.place}: a worker process failed:\n{message}")


_LESS_MEMORY = "Give fewer --workers or a smaller --max-document-mb, or look for a huge record there."


def _serve(connection: Connection, task: Task, tokenizer: Tokenizer | None, foreign: Sequence[Connection]) -> None:
    """Life of a worker: a chunk in, its result out, until the parent is gone."""
    for other in foreign:
        other.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler
    while True:
        try:
            chunk: Chunk = connection.recv()
            content: Any = connection.recv_bytes()
        except (EOFError, OSError):
            return
        answer: Result | tuple[str, str]
        try:
            if tokenizer is None:
                tokenizer = task.build_tokenizer()
            chunk.content = pickle.loads(content) if chunk.content is None else content
            del content
            answer = encode_chunk(chunk, task, tokenizer)
        except UserError as error:
            answer = "user", str(error)
        except MemoryError:
            answer = "memory", ""
        except BaseException:  # engines in Rust raise panics that are no Exception
            answer = "bug", traceback.format_exc()
        try:
            connection.send(answer)
        except OSError:
            return
        del answer, chunk
