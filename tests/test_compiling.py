"""Compiled functions are cached on disk if that is possible, and work if it is not."""

import warnings

import numba
import pytest
from numba.core import caching

from fewbit import compiling, files

INT = numba.types.int64


def square(x):
    return x * x


def cube(x):
    return x * x * x


WAYS = {
    "a function": lambda function: compiling.compiled()(function),
    "a callback": lambda function: compiling.callback(INT(INT))(function).ctypes,
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """numba's cache is in this test's folder, and no warning was given yet."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "_told", [])
    return tmp_path


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def paths(folder, suffix):
    return sorted(folder.rglob(f"*.{suffix}"))


def quietly(way, function=square):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert way(function)(3) == function(3)


def test_kept_and_found_again(way, own_folder, monkeypatch):
    quietly(way)
    assert len(paths(own_folder, "nbi")) == len(paths(own_folder, "nbc")) == 1
    monkeypatch.setattr(files, "write", lambda *_: pytest.fail("compiled again"))
    quietly(way)


DAMAGE = {
    "empty": lambda whole: b"",
    "cut short": lambda whole: whole[: len(whole) // 2],
    "zeros, as after a power cut": lambda whole: bytes(len(whole)),
    "one byte": lambda whole: whole[:-60] + bytes([whole[-60] ^ 1]) + whole[-59:],
    "no pickle": lambda whole: b"not a pickle at all",
}


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_mended(way, damage, suffix, own_folder):
    quietly(way)
    (path,) = paths(own_folder, suffix)
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    if (damage, suffix) == ("one byte", "nbi"):  # of a key: then the index does not have the function
        quietly(way)
    else:
        (index,) = paths(own_folder, "nbi")
        with pytest.warns(UserWarning, match=f"{index.name}, an index of compiled functions, .* is damaged .*: removed it"):
            assert way(square)(3) == 9
    quietly(way)


def test_data_of_another_function_are_not_taken(way, own_folder):
    """A process that is killed between writing the index and its data leaves an index that names an older file."""
    for function in (square, cube):
        quietly(way, function)
    first, second = paths(own_folder, "nbc")
    second.write_bytes(first.read_bytes())
    for function in (square, cube):
        quietly(way, function)


def refuse(number, text):
    def write(path, content):
        raise OSError(number, text, str(path))

    return write


@pytest.mark.parametrize(("number", "text"), [(28, "No space left on device"), (30, "Read-only file system")])
def test_a_cache_that_cannot_be_written(way, number, text, monkeypatch):
    monkeypatch.setattr(files, "write", refuse(number, text))
    with pytest.warns(UserWarning, match=f"{text}.*; set NUMBA_CACHE_DIR to a folder that can be written to") as seen:
        assert (way(square)(3), way(cube)(3)) == (9, 27)
    assert len(seen) == 1  # once for all functions


def test_no_folder_at_all(way, monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.warns(UserWarning, match="compiled functions are not kept, .*: cannot cache function 'square'"):
        assert way(square)(3) == 9


def test_says_once_that_it_compiles(way, caplog):
    compiling._tell_that_it_takes_time.cache_clear()
    with caplog.at_level("INFO", logger="fewbit.compiling"):
        quietly(way)
        quietly(way)  # found in the cache
        quietly(way, cube)
    assert [record.message[:17] for record in caplog.records] == ["compiling kernels"]
