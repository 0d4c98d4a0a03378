"""Runs tasks on worker processes of this machine, or on the ranks of an MPI job. Both yield records as they come."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ..corpus.sources import Task
from ..errors import UserError
from .tasks import Job, OnBatch, TaskRecord, Worker

ATTEMPTS = 3  # of one task, before its workers' deaths count as its fault


def make_worker(job: Job) -> Worker:
    """The worker for a job's kind of input."""
    if job.records is None:
        return Worker(job)
    from ..records.work import RecordWorker

    return RecordWorker(job)


def run_here(job: Job, tasks: Sequence[Task], progress: OnBatch) -> Generator[TaskRecord]:
    """In this process, one after the other."""
    worker: Worker | None = None
    for task in tasks:
        worker = worker or make_worker(job)
        yield worker.run(task, progress)


def run_executor(job: Job, tasks: Sequence[Task], progress: OnBatch, executor: Executor) -> Generator[TaskRecord]:
    """On a `concurrent.futures` executor, such as MPI ranks that serve through `mpi4py.futures`."""
    futures = [executor.submit(run_task, job, task) for task in tasks]
    try:
        for future in as_completed(futures):
            record = future.result()
            progress(record.documents, record.tokens, record.text_bytes)
            yield record
    finally:
        for future in futures:
            future.cancel()


def run_task(job: Job, task: Task) -> TaskRecord:
    """One task in this process, with the worker of the task before if there was one."""
    return _worker(job).run(task)


@lru_cache(maxsize=1)
def _worker(job: Job) -> Worker:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return make_worker(job)


def run_processes(
    job: Job, tasks: Sequence[Task], progress: OnBatch, workers: int, say: Callable[[str], None]
) -> Generator[TaskRecord]:
    """On `workers` processes. A worker that dies is reported and replaced, and its task given out again."""
    pool = _Pool(job, min(workers, len(tasks)), say)
    try:
        yield from pool.run(tasks, progress)
    finally:
        pool.close()


class _Pool:
    """Processes that each hold one end of a pipe: a closed pipe tells either side that the other is gone."""

    def __init__(self, job: Job, workers: int, say: Callable[[str], None]) -> None:
        self.job = job
        self.say = say
        self.context = multiprocessing.get_context("forkserver")
        self.workers = [self._start() for _ in range(workers)]

    def _start(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(self.job, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def run(self, tasks: Sequence[Task], progress: OnBatch) -> Generator[TaskRecord]:
        waiting = deque((task, 1) for task in tasks)
        running: dict[Connection, tuple[Task, int]] = {}
        for _, pipe in self.workers:
            self._give(pipe, waiting, running)
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError):
                    waiting.appendleft(self._replace(pipe, *running.pop(pipe)))
                    self._give(self.workers[-1][1], waiting, running)
                    continue
                if kind == "progress":
                    progress(*value)
                    continue
                del running[pipe]
                if kind == "error":
                    raise value
                self._give(pipe, waiting, running)
                yield value

    @staticmethod
    def _give(pipe: Connection, waiting: deque[tuple[Task, int]], running: dict[Connection, tuple[Task, int]]) -> None:
        if waiting:
            task, attempt = waiting.popleft()
            running[pipe] = (task, attempt)
            with suppress(OSError):  # it died idle; the next wait reports the closed pipe
                pipe.send(task)

    def _replace(self, pipe: Connection, task: Task, attempt: int) -> tuple[Task, int]:
        """Starts a worker for the one that died at its `attempt`-th try of a task."""
        position = [own for _, own in self.workers].index(pipe)
        process, _ = self.workers.pop(position)
        process.join()
        how = _cause(process.exitcode)
        names = ", ".join(dict.fromkeys(part.path for part in task.slices[:3]))
        if attempt == ATTEMPTS:
            raise UserError(f"a worker {how} each of {ATTEMPTS} times that it read {names} (task {task.number})")
        self.say(f"a worker {how} in task {task.number} ({names}); the task is given to another")
        pipe.close()
        self.workers.append(self._start())
        return task, attempt + 1

    def close(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.terminate()
        for process, _ in self.workers:
            process.join()


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"
    return f"ended with exit code {code}"


def _serve(job: Job, pipe: Connection) -> None:
    """A worker's life: tasks in, progress and records out, until the parent is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides

    def progress(*added: int) -> None:
        if pipe.poll():  # nothing is sent to a busy worker: the pipe is closed
            os._exit(1)
        pipe.send(("progress", added))

    try:
        worker: Worker | None = None
        while True:
            task = pipe.recv()
            try:
                worker = worker or make_worker(job)
                answer: tuple[str, Any] = ("done", worker.run(task, progress))
            except Exception as error:
                answer = ("error", error)
            pipe.send(answer)
    except (EOFError, OSError):
        os._exit(0)
