"""Test the store with kills, full disks, races and damaged files. Prints counts, and fails if a file or a table is bad.

.venv/bin/python tools/torture_store.py --kills 300
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import fewbit
from fewbit import files, store
from fewbit.errors import TableFileError


def write_again_and_again(folder: Path) -> None:
    """Overwrite tables, designs and texts until killed."""
    tables = [fewbit.load_table("gelu", bits) for bits in (1, 2, 3, 4)]
    for i in itertools.count(random.randrange(1000)):
        tables[i % 4].save(folder / "table.json")
        store._load.cache_clear()
        fewbit.load_table("elu", 1 + i % 3, alpha=0.5 + 0.001 * (i % 7))
        files.write(folder / "text", str(i % 10) * 200_000)
        files.write(folder / "link", str(i % 10) * 1000)


def start(folder: Path, code: str, **variables: str) -> subprocess.Popen:
    """Start a process that runs the code in the folder, with its cache there."""
    root = str(Path(fewbit.__file__).parents[1])
    variables = {**os.environ, "PYTHONPATH": root, "FEWBIT_CACHE_DIR": str(folder / "cache"), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def check(folder: Path, seen: Counter[str]) -> None:
    """Count the files in the folder. Raises if one of them is not complete."""
    for path in [*(folder / "cache").glob("*.json"), *folder.glob("table.json")]:
        try:
            fewbit.CodeTable.load(path)
            seen["whole tables"] += 1
        except TableFileError as error:
            seen["BAD tables"] += 1
            print(error)
    for name, size in (("text", 200_000), ("target", 1000)):
        if (folder / name).exists():
            text = (folder / name).read_text()
            seen["whole texts" if text == text[:1] * size else "BAD texts"] += 1
    if not (folder / "link").is_symlink():
        seen["BAD links"] += 1
    seen["temporary files, which are collected later"] += len(list(folder.rglob(".fewbit-*.tmp")))


def kills(count: int, draw: random.Random, folder: Path) -> Counter[str]:
    """Kill writers at random moments. After each kill, every file must be complete."""
    seen: Counter[str] = Counter()
    (folder / "link").symlink_to("target")
    os.environ["FEWBIT_CACHE_DIR"] = str(folder / "cache")
    fewbit.load_table("elu", 2, alpha=0.4)  # loads the compiler, before the forks
    for _ in range(count):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it would be lost in Python's own work after a fork
        child = os.fork()
        if child == 0:
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                write_again_and_again(folder)
            finally:  # the interrupt may have become another error in it
                os._exit(0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        time.sleep(draw.random() * 0.1)
        os.kill(child, draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        for _ in range(100):
            if os.waitpid(child, os.WNOHANG)[0]:
                break
            time.sleep(0.01)
        else:  # the interrupt came in a callback and was lost
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        seen["kills"] += 1
        check(folder, seen)
        for path in (folder / "cache").glob("*.json"):  # so that the next process designs again
            path.unlink()
        for path in folder.rglob(".fewbit-*.tmp"):  # as if they were an hour old
            before = time.time() - 7200
            os.utime(path, (before, before))
    for path in (folder / "text", folder / "cache" / "x"):
        files.write(path, "0" * 200_000)
    left = len(list(folder.rglob(".fewbit-*.tmp")))
    seen["BAD temporary files that were not collected" if left else "folders collected"] += 1
    return seen


def full(count: int, draw: random.Random, folder: Path) -> Counter[str]:
    """Write with room for only so many bytes. After each error, the old file must be complete."""
    seen: Counter[str] = Counter()
    table, other = fewbit.load_table("gelu", 3), fewbit.load_table("silu", 4)
    path = folder / "table.json"
    table.save(path)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # exceeding the limit is then an error, like a full disk
    for _ in range(count):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (draw.randrange(1500), hard))
        try:
            other.save(path)
            seen["saved"] += 1
        except OSError:
            seen["refused"] += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        found = fewbit.CodeTable.load(path)
        seen["whole tables" if found in (table, other) else "BAD tables"] += 1
        table, other = found, table if found == other else other
        seen["BAD temporary files"] += len(list(folder.glob(".fewbit-*.tmp")))
    return seen


def races(count: int, draw: random.Random, folder: Path) -> Counter[str]:
    """Let processes design the same tables at the same time into one cache, and compile into one empty folder of numba."""
    seen: Counter[str] = Counter()
    code = """
import fewbit, torch
print([fewbit.load_table("elu", bits, alpha={alpha}).mse for bits in (1, 2, 3)])
x = torch.linspace(-3, 3, 1000, dtype=torch.{dtype}).requires_grad_()
fewbit.functional.elu(x, {alpha}, bits=2).sum().backward()
print(x.grad.double().sum().item())
"""
    for _ in range(count):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            alpha = draw.random()
            dtypes = [draw.choice(["float32", "float64", "bfloat16"]) for _ in range(3)]
            codes = [code.format(alpha=alpha, dtype=dtype) for dtype in dtypes]
            runs = [start(Path(place), each, NUMBA_CACHE_DIR=f"{place}/numba", PYTHONWARNINGS="error") for each in codes]
            said = [run.communicate() for run in runs]
            again = [start(Path(place), each, NUMBA_CACHE_DIR=f"{place}/numba") for each in codes]
            same = [run.communicate()[0] for run in again] == [out for out, _ in said]
            quiet = not any(err for _, err in said)
            seen["races"] += 1
            seen["all agree" if same and quiet else "BAD disagreements or errors"] += 1
            if not (same and quiet):
                print(*said, sep="\n")
            for path in Path(place, "cache").iterdir():
                fewbit.CodeTable.load(path)
                seen["whole tables"] += 1
    return seen


def damaged(count: int, draw: random.Random, folder: Path) -> Counter[str]:
    """Change random bytes of a cached file. The table must stay the same, read from the file or designed again."""
    seen: Counter[str] = Counter()
    os.environ["FEWBIT_CACHE_DIR"] = str(folder / "cache")
    store._load.cache_clear()
    table = fewbit.load_table("elu", 3, alpha=0.25)
    (path,) = (folder / "cache").glob("*.json")
    whole = path.read_bytes()
    for _ in range(count):
        data = whole
        for _ in range(draw.choice([1, 1, 1, 3, 30])):
            at, one = draw.randrange(len(data)), draw.choice([b"0123456789", b'-+e.,[]{}" ', bytes(range(256))])
            new = draw.choice([b"", bytes([draw.choice(one)])])
            data = data[:at] + new + data[at + draw.randrange(2) :]
        path.write_bytes(data)
        store._load.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = fewbit.load_table("elu", 3, alpha=0.25)
        close = (
            found.levels.shape == table.levels.shape
            and abs(found.mse - table.mse) < 1e-3 * table.mse  # type: ignore[operator]
            and abs(found.levels - table.levels).max() < 0.1
        )
        seen["designed anew, with a warning" if told else "same table" if found == table else "another table"] += 1
        if not close:
            seen["BAD tables"] += 1
        if not told:
            path.write_bytes(whole)
    return seen


def main() -> None:
    """Run the parts named on the command line."""
    parts = {"kills": kills, "full": full, "races": races, "damaged": damaged}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in parts:
        parser.add_argument(f"--{name}", type=int, default=0, help=(parts[name].__doc__ or "").split(":")[0])
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    bad = False
    for name, part in parts.items():
        if arguments[name]:
            with tempfile.TemporaryDirectory() as folder:
                seen = part(arguments[name], random.Random(arguments["seed"]), Path(folder))
            print(f"{name}: " + ", ".join(f"{number} {what}" for what, number in seen.items() if number))
            bad |= any(what.startswith("BAD") and number for what, number in seen.items())
    sys.exit(bad)


if __name__ == "__main__":
    main()
