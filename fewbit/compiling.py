"""Compiles functions with numba and caches them, so that each is compiled once per machine; without a cache, once per process.

This guards against three faults of numba's own cache. numba raises if the cache cannot be written. It raises in every later
process if a file of the cache is damaged. It writes an index before the data that the index names, so a killed process, or two
processes at once, can leave an index that leads to another function's code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numba
from numba.core import sigutils
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.ccallback import CFunc

from fewbit import files
from fewbit.text import plain

_log = logging.getLogger(__name__)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with these options, cached."""

    def decorate(function: Callable[..., Any]) -> Any:
        made: Any = numba.njit(**options)(function)
        if hasattr(made, "_cache"):  # not with NUMBA_DISABLE_JIT
            made._cache = _cache_of(function)
        return made

    return decorate


def callback(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], CFunc]:
    """`numba.cfunc` with this signature and these options, cached."""

    def decorate(function: Callable[..., Any]) -> CFunc:
        made = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)
        made._cache = _cache_of(function)  # type: ignore[assignment]
        made.compile()
        return made

    return decorate


def _cache_of(function: Callable[..., Any]) -> FunctionCache | NullCache:
    try:
        return _Cache(function)
    except Exception as error:  # there is no folder for the cache
        _not_kept(str(error))
        return NullCache()


class _Cache(FunctionCache):
    """numba's cache, except that it does without files that it cannot load or save, and removes damaged ones."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)
        self._cache_file = _CacheFile(self._cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception as error:  # damaged files raise whatever pickle raises
            removed = self._cache_file.remove()
            how = "removed it, and compile the function anew" if removed else "compile the function anew; delete that file"
            what = f"{self._cache_file.index}, an index of compiled functions, or a file that it names is damaged"
            warnings.warn(plain(f"{what} ({type(error).__name__}: {error}): {how}"), stacklevel=2)
            found = None
        if found is None:
            _tell_that_it_takes_time()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _not_kept(f"cannot write to {self._cache_path} ({error})")


@cache
def _tell_that_it_takes_time() -> None:
    _log.info("compiling kernels, which takes up to a minute; they are kept for next time")


class _CacheFile(IndexDataCacheFile):
    """numba's cache file with checked data: they name their function and have a digest. Files are written completely or not at
    all."""

    @property
    def index(self) -> str:
        return self._index_path

    def remove(self) -> bool:
        """Remove the index, and with it all that is cached. Returns whether that was possible."""
        with contextlib.suppress(OSError):
            os.unlink(self._index_path)
            return True
        return False

    def save(self, key: Any, data: Any) -> None:
        content = self._dump((self._source_stamp, key, data))
        super().save(key, (hashlib.sha256(content).digest(), content))

    def load(self, key: Any) -> Any:
        found = super().load(key)
        if found is None:
            return None
        digest, content = found
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("its bytes have changed")
        stamp, own, data = pickle.loads(content)
        return data if (stamp, own) == (self._source_stamp, key) else None

    @contextlib.contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:  # type: ignore[override]
        content = io.BytesIO()
        yield content
        files.write(filepath, content.getvalue())


_told: list[str] = []  # the first reason why nothing is cached; later ones are not reported


def _not_kept(reason: str) -> None:
    if not _told:
        _told.append(reason)
        warnings.warn(
            plain(
                f"compiled functions are not kept, and each process compiles them anew: {reason}; "
                "set NUMBA_CACHE_DIR to a folder that can be written to and has room"
            ),
            stacklevel=4,
        )
