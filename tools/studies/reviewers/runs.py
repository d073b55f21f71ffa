"""Runs of a study, each written to its file as soon as it is finished; several processes may share the work."""

from __future__ import annotations

import fcntl
import json
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.studies import common

Run = dict[str, Any]  # the entries that identify it, and its results


class Runs:
    """The runs in directory/reviewers_STUDY.json.

    A run in this file is not run again. While a process works on a run, others skip it. If that process is killed, its lock is
    released.
    """

    def __init__(self, study: str, directory: Path | None = None):
        self.name, self.directory = f"reviewers_{study}", directory or common.RESULTS

    def __iter__(self) -> Iterator[Run]:
        path = self.directory / f"{self.name}.json"
        return iter(json.loads(path.read_text(encoding="utf-8"))["results"]["runs"] if path.exists() else ())

    def add(self, run: Run) -> None:
        """Write one more run."""
        with self._locked("file"):
            common.write(self.name, {"runs": [*self, run]}, self.directory)

    def fill(self, wanted: Iterable[Run], work: Callable[..., Run]) -> None:
        """Add each wanted run that is missing. The arguments of `work` identify a run."""
        for each in wanted:
            with self._locked(json.dumps(each, sort_keys=True), wait=False) as claimed:
                if claimed and not any(each.items() <= run.items() for run in self):
                    self.add({**each, **work(**each)})

    @contextmanager
    def _locked(self, what: str, wait: bool = True) -> Iterator[bool]:
        """True while no other process holds the lock of that name; False, without waiting for it, if one does."""
        key = zlib.crc32(f"{self.directory.resolve()} {self.name} {what}".encode())
        with open(Path(tempfile.gettempdir()) / f"fewbit-{key:08x}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
