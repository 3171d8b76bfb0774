"""A full disk, a quota, a failing or vanishing one: one line, the right status, nothing half written, all resumable."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import crash
import pytest
import small
from test_io_hdf import contents

from mrefali import cli, io
from mrefali.io import open_stack

MAXIT = 2

pytestmark = pytest.mark.jit_only  # whole runs by the hundred


def call(folder, *words):
    names = [str(folder / name) for name in ("stack.hdf", "refs.hdf", "out")]
    return ["mref_ali2d", *names, *small.WORDS, f"--maxit={MAXIT}", *words]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with room, and the stack it began with."""
    folder = tmp_path_factory.mktemp("whole")
    small.write(folder)
    shutil.copyfile(folder / "stack.hdf", folder / "before.hdf")
    assert cli.main(call(folder)) == 0
    return folder


def prepare(whole, folder):
    folder.mkdir()
    shutil.copyfile(whole / "before.hdf", folder / "stack.hdf")
    shutil.copyfile(whole / "refs.hdf", folder / "refs.hdf")
    return folder


def check_failed(whole, folder, status, err):
    """One line, nothing half written, the stack all old or all new; and what was finished is as in the whole run."""
    lines = [line for line in err.splitlines() if "warning" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("mrefali: error: ")
    assert status == (1 if (folder / "out").exists() else 2), err
    old, new = contents(whole / "before.hdf"), contents(whole / "stack.hdf")
    open_stack(folder / "stack.hdf")  # which finishes a journal
    assert contents(folder / "stack.hdf") in (old, new)
    for file in (folder / "out").rglob("*") if (folder / "out").exists() else ():
        assert not file.name.startswith("."), file
        if re.match("aqm|drm|multi|poses_before", file.name):
            assert file.read_bytes() == (whole / "out" / file.name).read_bytes(), file
        if file.name in ("poses.csv", "history.csv"):
            assert file.read_text().endswith("\n")
            rows = {"poses.csv": [small.N_PARTICLES + 1], "history.csv": [3, 5]}[file.name]
            assert file.read_text().count("\n") in rows


def check_resumed(whole, folder, *words):
    assert cli.main(call(folder, "--resume", *words)) == 0
    for name in sorted(os.listdir(whole / "out")):
        if Path(name).suffix in (".csv", ".txt", ".hdf"):
            assert (folder / "out" / name).read_bytes() == (whole / "out" / name).read_bytes(), name
    assert contents(folder / "stack.hdf") == contents(whole / "stack.hdf")


# ---- a small disk


@contextmanager
def disk(folder, n_bytes):
    """A file system of so many bytes at ``folder``; whether one could be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", folder]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def files_up_to(n_bytes):
    """No file may grow larger: what is left where nothing can be mounted."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


PAGE, SIZE, NO_FILLER = 4096, 1 << 20, ""

#: Fills the disk but for so many pages when the first average is made, so that later writes meet its end.
FILL = """
import os
from mrefali.reference import ref_ali2d

def fill(*arguments):
    filler, pages = os.environ["FILLER"], os.environ["PAGES"]
    if pages and not os.path.exists(filler):
        free = os.statvfs(os.path.dirname(filler))
        with open(filler, "wb") as file:
            file.write(bytes(max(0, free.f_bavail - int(pages)) * free.f_frsize))
    return ref_ali2d(*arguments)
"""


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_after_any_number_of_pages(tmp_path, whole, capsys, monkeypatch, step):
    """The filler goes when the run has failed, and the run goes on."""
    (tmp_path / "own.py").write_text(FILL)
    function, statuses = f"--function={tmp_path}/own.py:fill", []
    with disk(tmp_path / "disk", SIZE) as mounted:
        monkeypatch.setenv("FILLER", str(tmp_path / "disk/filler"))
        for pages in range(0, 80, step):
            # where nothing can be mounted, no file may grow beyond a size
            limit = SIZE if mounted else max(1, pages) * 1024
            monkeypatch.setenv("PAGES", str(pages if mounted else NO_FILLER))
            folder = prepare(whole, tmp_path / "disk" / "job")
            with files_up_to(limit):
                statuses.append(cli.main(call(folder, function)))
            err = capsys.readouterr().err
            (tmp_path / "disk/filler").unlink(missing_ok=True)
            if statuses[-1]:
                assert re.search("No space left|make room" if mounted else "too large", err)
                check_failed(whole, folder, statuses[-1], err)
                if (folder / "out").exists():
                    monkeypatch.setenv("PAGES", NO_FILLER)
                    check_resumed(whole, folder, function)
                    capsys.readouterr()
            shutil.rmtree(folder)
            (tmp_path / "disk/filler").unlink(missing_ok=True)
    assert set(statuses) >= {0, 1}
    assert statuses[-1] == 0
    assert statuses.count(1) > 20 // step


def test_a_disk_that_is_full_before_the_first_iteration_gets_nothing(tmp_path, whole, capsys):
    with disk(tmp_path / "disk", 16 * PAGE) as mounted:
        if mounted:
            small.write(tmp_path)
            names = [str(tmp_path / "stack.hdf"), str(tmp_path / "refs.hdf"), str(tmp_path / "disk/out")]
            assert cli.main(["mref_ali2d", *names, *small.WORDS]) == 2
            assert re.fullmatch("mrefali: error: .*/out gets the results of 10 iterations, which takes 0.[0-9] MB, "
                                "but .*/disk has 0.1 MB free: make room, or give a place where there is more\n",
                                capsys.readouterr().err)
            assert os.listdir(tmp_path / "disk") == []
    folder = prepare(whole, tmp_path / "job")
    with files_up_to(100):
        assert cli.main(call(folder)) == 2
    assert capsys.readouterr().err == f"mrefali: error: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}\n"
    assert sorted(os.listdir(folder)) == ["refs.hdf", "stack.hdf"]


@pytest.mark.parametrize("kb", [1, 2, 5, 10, 15, 20, 40, 60, 70, 80])
def test_a_file_that_may_not_grow(tmp_path, whole, capsys, kb):
    folder = prepare(whole, tmp_path / "job")
    with files_up_to(1024 * kb):
        status = cli.main(call(folder))
    err = capsys.readouterr().err
    if status:
        check_failed(whole, folder, status, err)
    if (folder / "out").exists():
        check_resumed(whole, folder)


# ---- calls that fail


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_any_call_of_a_run_may_fail_from_then_on(tmp_path, whole, capsys, step):
    """Every call that creates, writes, syncs, renames or removes; the reasons take turns."""
    reasons = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS]
    at, statuses = 0, []
    while True:
        folder, calls = prepare(whole, tmp_path / f"job{at}"), []
        number = reasons[at % len(reasons)]

        def fail(name, arguments, at=at, number=number, calls=calls):
            calls.append((name, arguments))
            if len(calls) > at:
                raise OSError(number, os.strerror(number), arguments[0] if isinstance(arguments[0], str) else None)

        with crash.before_each_call(fail):
            status = cli.main(call(folder))
        err = capsys.readouterr().err
        (folder / ".stack.hdf.lock").unlink(missing_ok=True)
        if len(calls) <= at or status == 0:
            assert [name for name, _ in calls[at:]] in ([], ["unlink"])  # the lock
            break
        for left in (folder / "out").rglob(".*"):  # that could not be removed any more
            left.unlink()
        assert os.strerror(number) in err, err
        if status == 2:  # a directory that could not be removed any more has nothing in it that counts
            shutil.rmtree(folder / "out", ignore_errors=True)
        check_failed(whole, folder, status, err)
        if (folder / "out").exists():
            check_resumed(whole, folder)
            capsys.readouterr()
        shutil.rmtree(folder)
        statuses.append(status)
        at += step
    assert set(statuses) == {1, 2}
    assert at > 60


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize(("reads", "status"), [(0, 2), (1, 2), (3, 1)])
def test_a_network_folder_that_disappears(tmp_path, whole, capsys, monkeypatch, number, reads, status):
    """The stack cannot be read any more, before the first iteration or in it."""
    folder, done, read = prepare(whole, tmp_path / "job"), [], io.HdfStack._read

    def fail(self, indices):
        if self.path.endswith("stack.hdf"):
            done.append(len(indices))
            if len(done) > reads:
                raise OSError(number, os.strerror(number), self.path)
        return read(self, indices)

    monkeypatch.setattr(io.HdfStack, "_read", fail)
    assert cli.main(call(folder)) == status
    err = capsys.readouterr().err
    assert err.startswith(f"mrefali: error: {folder}/stack.hdf: {os.strerror(number)}")
    check_failed(whole, folder, status, err)
    monkeypatch.undo()
    if status == 1:
        check_resumed(whole, folder)
