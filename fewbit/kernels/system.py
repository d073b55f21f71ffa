"""System services for the CPU backend: torch's own threads, scratch memory, and huge pages."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fewbit.kernels import loops

_GRAIN = 1 << 15  # least elements per thread, as in torch
_HUGE = 1 << 25  # from this many bytes on, glibc maps new memory for each tensor, and page faults take most of the time


_KEPT = 1 << 17  # bytes of scratch memory that each thread keeps for small calls
_of_thread = threading.local()


def _own_scratch() -> int:
    """The address of this thread's own scratch memory. Small calls keep the GIL, so no other call uses it before one ends."""
    try:
        return _of_thread.address
    except AttributeError:
        _of_thread.memory = memory = ctypes.create_string_buffer(_KEPT + 64)
        _of_thread.address = address = -(-ctypes.addressof(memory) // 64) * 64
        return address


class Kernel:
    """A compiled function that takes the address of a block. Any number of threads may call it at once on the same block.

    scratch  bytes of memory that each thread needs for each word of a chunk
    """

    def __init__(self, compiled: Any, scratch: int):
        self.compiled, self.scratch = compiled, scratch  # `compiled` owns the machine code
        self.address = compiled.address
        self.call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)  # releases the GIL
        self.call_at_once = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(compiled.address)  # keeps the GIL, for little work

    def run(self, block: Any, n: int) -> None:
        """Run on a block of `fewbit.kernels.loops` for n elements, in as many threads as torch would use.

        Raises RuntimeError if the kernel did not do all of its work; its results are then incomplete.
        """
        words = block.words
        self._start(block, n, -(-words // loops.CHUNK), min(loops.CHUNK, words) * self.scratch)
        if block.done != words:
            raise RuntimeError(f"a kernel of fewbit did {block.done} of {words} words; run it again")

    def share(self, block: Any, n: int, pieces: int, scratch: int) -> None:
        """Like `run`, for kernels whose work is counted in pieces. Each thread gets `scratch` bytes of memory."""
        self._start(block, n, pieces, scratch)
        if block.done != pieces:
            raise RuntimeError(f"a kernel of fewbit did {block.done} of {pieces} pieces; run it again")

    def _start(self, block: Any, n: int, pieces: int, bytes_of_thread: int) -> None:
        argument = ctypes.byref(block)
        if n < _GRAIN and bytes_of_thread <= _KEPT:
            block.scratch = _own_scratch()
            self.call_at_once(argument)
            return
        threads = torch.get_num_threads() if n >= 2 * _GRAIN else 1
        busy = 1 if threads == 1 else min(threads, pieces)
        scratch = torch.empty(busy * bytes_of_thread, dtype=torch.uint8, device="cpu")
        block.scratch = scratch.data_ptr()
        if n < _GRAIN:
            self.call_at_once(argument)
        elif threads < 2:
            self.call(argument)
        elif (parallel := _openmp()) is not None:
            parallel(self.address, argument, threads, 0)  # all threads: a smaller team would end the others
        else:
            self._run_in_pool(argument, min(threads, n // _GRAIN))

    def _run_in_pool(self, argument: Any, threads: int) -> None:
        others: list[Future] = []
        try:
            with contextlib.suppress(RuntimeError):  # if no more threads can be started, those that run do the work
                others.extend(_pool(os.getpid()).submit(self.call, argument) for _ in range(threads - 1))
            self.call(argument)
        finally:  # the block holds addresses of the caller's memory
            wait(others)


@cache
def _openmp() -> Callable[..., None] | None:
    """GOMP_parallel(function, argument, threads, flags) of torch's own OpenMP runtime, if it has one.

    Other threads would compete for the cores with torch's threads, which spin for a while after each operation.
    """
    for library in Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"):
        try:
            parallel = ctypes.CDLL(str(library)).GOMP_parallel  # the lookup includes the libraries that torch is linked with
        except (OSError, AttributeError):
            continue
        parallel.restype, parallel.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return parallel
    return None


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process, for use without OpenMP. A forked child does not have its parent's threads and makes its own."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fewbit")


def in_huge_pages(empty: torch.Tensor) -> torch.Tensor:
    """A new tensor. If it is large and the system has huge pages, it is put there: each fault then maps 512 times as much."""
    size = empty.nbytes
    if size >= _HUGE and (advise := _madvise()) is not None:
        begin = -(-empty.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(begin, size - mmap.PAGESIZE, mmap.MADV_HUGEPAGE)  # the system may ignore this
    return empty


@cache
def _madvise() -> Callable[..., int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
