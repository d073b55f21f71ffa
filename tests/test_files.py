"""Files are written completely or not at all, through links and devices, and reading is bounded."""

import errno
import os
import stat
import subprocess
import sys
import threading
import time

import pytest
from matplotlib.figure import Figure

import fewbit
from fewbit import files
from fewbit.plots import save

posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and modes as POSIX has them")


def test_text_and_bytes(tmp_path):
    path = tmp_path / "a"
    files.write(path, "ä\ud800")
    assert path.read_bytes() == "ä\\ud800".encode()
    files.write(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


@posix
class TestWhatIsThere:
    def test_a_link_stays(self, tmp_path):
        (tmp_path / "folder").mkdir()
        target, link = tmp_path / "folder" / "target", tmp_path / "link"
        link.symlink_to("folder/target")
        for content in ("made through the link", "written through it"):
            files.write(link, content)
            assert link.is_symlink()
            assert target.read_text() == content
        assert os.listdir(tmp_path / "folder") == ["target"]

    def test_links_in_a_circle(self, tmp_path):
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(OSError, match="Too many levels") as caught:
            files.write(tmp_path / "a", "")
        assert caught.value.filename == str(tmp_path / "a")

    @pytest.mark.parametrize("mode", [0o600, 0o644, 0o666, 0o751])
    def test_the_mode_stays(self, mode, tmp_path):
        path = tmp_path / "a"
        path.write_text("old")
        path.chmod(mode)
        files.write(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == mode

    @pytest.mark.parametrize("step", ["fchmod", "fchown", "fsync"])
    def test_where_files_have_no_modes(self, step, tmp_path, monkeypatch):
        (tmp_path / "a").write_text("old")

        def refuse(*_):
            raise OSError(errno.ENOTSUP, "Operation not supported")

        monkeypatch.setattr(os, step, refuse)
        files.write(tmp_path / "a", "new")
        assert (tmp_path / "a").read_text() == "new"

    def test_a_new_file_has_the_usual_mode(self, tmp_path):
        (tmp_path / "usual").write_text("")
        files.write(tmp_path / "new", "")
        assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode

    def test_what_is_private_is_never_open_to_others(self, tmp_path, monkeypatch):
        path, seen = tmp_path / "a", []
        path.write_text("old")
        path.chmod(0o600)
        monkeypatch.setattr(os, "fsync", lambda _: seen.extend(each.stat().st_mode & 0o077 for each in tmp_path.iterdir()))
        files.write(path, "new")
        assert seen == [0, 0]

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files away")
    def test_the_owner_stays(self, tmp_path):
        path = tmp_path / "a"
        path.write_text("old")
        os.chown(path, 1, 2)
        files.write(path, "new")
        assert (path.stat().st_uid, path.stat().st_gid) == (1, 2)

    def test_a_protected_file_is_not_replaced(self, tmp_path, monkeypatch):
        path = tmp_path / "a"
        path.write_text("old")
        monkeypatch.setattr(os, "access", lambda *_: False)  # as for users other than root
        with pytest.raises(PermissionError, match="Permission denied"):
            files.write(path, "new")
        assert path.read_text() == "old"

    def test_a_pipe_is_written_through(self, tmp_path):
        path, read = tmp_path / "pipe", []
        os.mkfifo(path)
        reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
        reader.start()
        files.write(path, "through")
        reader.join(10)
        assert read == [b"through"]
        assert stat.S_ISFIFO(path.stat().st_mode)

    def test_a_device_is_written_through(self):
        before = os.stat("/dev/null")
        files.write("/dev/null", "gone")
        assert os.path.samestat(os.stat("/dev/null"), before)
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
    def test_a_full_device(self):
        with pytest.raises(OSError, match="No space left on device") as caught:
            files.write("/dev/full", "much")
        assert caught.value.filename == "/dev/full"

    @pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="there is no /dev/stdout here")
    @pytest.mark.parametrize("piped", [False, True])
    def test_standard_output(self, piped, tmp_path):
        """The old content of the file, and what is printed before and after, stay in order."""
        code = "from fewbit import files; print('a'); files.write('/dev/stdout', 'b\\n'); print('c')"
        path = tmp_path / "out"
        path.write_text("0\n")
        command = f'{sys.executable} -c "{code}" {"| cat" if piped else ""} >> {path}'
        subprocess.run(command, shell=True, check=True)
        assert path.read_text() == "0\na\nb\nc\n"
        assert os.listdir(tmp_path) == ["out"]

    def test_a_folder_is_refused(self, tmp_path):
        with pytest.raises(IsADirectoryError):
            files.write(tmp_path, "")


def figure():
    drawn = Figure()
    drawn.subplots().plot([1, 2])
    return drawn


WRITERS = {
    "text": lambda path: files.write(path, "new"),
    "a table": lambda path: fewbit.load_table("gelu", 3).save(path),
    "a picture": lambda path: save(figure(), path),
}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("writer", WRITERS)
def test_after_an_error_the_old_file_is_whole(writer, step, error, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, step, fail, raising=False)
    with pytest.raises(type(error)) as caught:
        WRITERS[writer](path)
    if isinstance(error, OSError):
        assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_collected_later(tmp_path):
    code = (
        f"import os; from fewbit import files; os.replace = lambda *_: os._exit(9); files.write({str(tmp_path / 'a')!r}, 'x')"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    left, fresh = tmp_path.iterdir()
    os.utime(left, (time.time() - 7200,) * 2)
    files.write(tmp_path / "b", "")
    assert sorted(tmp_path.iterdir()) == sorted([fresh, tmp_path / "b"])  # the file of a process that may still live stays


class TestReading:
    def test_bounds(self, tmp_path):
        (tmp_path / "a").write_bytes(bytes(1 << 20))
        assert files.read(tmp_path / "a", 1 << 20) == bytes(1 << 20)
        (tmp_path / "a").write_bytes(bytes((1 << 20) + 1))
        with pytest.raises(OSError, match="larger than the limit of 1 MiB") as caught:
            files.read(tmp_path / "a", 1 << 20)
        assert caught.value.filename == str(tmp_path / "a")

    @posix
    def test_only_regular_files(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "endless").symlink_to("/dev/zero")
        for path in (tmp_path / "pipe", tmp_path / "endless", tmp_path):
            with pytest.raises(OSError, match=r"not a regular file|Is a directory") as caught:
                files.read(path, 100)
            assert caught.value.filename == str(path)


class TestPictures:
    @pytest.mark.parametrize("name", ["a.png", "a.svg", "a.PDF", "a"])
    def test_the_suffix_is_the_format(self, name, tmp_path):
        save(figure(), tmp_path / name)
        (path,) = tmp_path.iterdir()
        assert path.name == (name if "." in name else "a.png")
        start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[path.suffix.lower()]
        assert path.read_bytes().startswith(start)

    def test_an_unknown_format(self, tmp_path):
        with pytest.raises(fewbit.InputError, match="no picture can be written as xyz: "):
            save(figure(), tmp_path / "a.xyz")
        assert list(tmp_path.iterdir()) == []
