"""Run a function on many items in processes of their own, which may die."""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

SECONDS = 300  # an item that takes longer counts as hanging


def silence_torch() -> None:
    """Switch off warnings, which random networks cause, and the log of code that does not compile."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)


class Death(str):
    """Given instead of a result: how a process ended, or what it raised."""


class _Worker:
    def __init__(self, function: Callable[[Any], Any]):
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, function), daemon=True)
        self.process.start()
        far.close()

    def result(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return Death(f"the process died: exit code {self.process.exitcode}")


def isolated(function: Callable[[Any], Any], items: Iterable[Any], processes: int) -> Iterator[tuple[Any, Any]]:
    """Each item, in the order of completion, with function(item) or with the Death of its process."""
    items, busy, workers = iter(items), {}, [_Worker(function) for _ in range(processes)]

    def give(worker: _Worker) -> None:
        for item in items:
            worker.pipe.send(item)
            busy[worker.pipe] = worker, item
            return

    for worker in workers:
        give(worker)
    while busy:
        ready = wait(list(busy), SECONDS)
        for pipe in ready or list(busy):
            worker, item = busy.pop(pipe)
            if not ready:
                worker.process.kill()
            result = worker.result()
            if not worker.process.is_alive():
                worker = _Worker(function)
            yield item, result
            give(worker)


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    torch.set_num_threads(1)
    try:
        while True:
            item = pipe.recv()
            try:
                result = function(item)
            except Exception as error:
                result = Death(f"{type(error).__name__}: {error}")
            pipe.send(result)
    except EOFError:
        pass
