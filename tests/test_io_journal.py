"""Headers change in all images or none, whenever the process is killed or the power fails; see ``crash``."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import crash
import h5py
import numpy as np
import pytest
from test_io_hdf import ordinary_user

from mrefali import cli
from mrefali.errors import InputError
from mrefali.io import hold, journal, lock, open_stack, write_stack

WAYS = ["journal", "copy"]


@pytest.fixture
def stack(tmp_path):
    """The path of a stack, as str."""
    path = str(tmp_path / "stack.hdf")
    crash.make_stack(path)
    return path


def journal_of(path):
    return Path(journal.journal_name(path))


def leave_journal(path, version=1, write=0):
    """Leave a committed journal beside the file, of which so many writes have reached it."""
    calls, whole = [], journal._write_all

    def stop(file, data, at):
        if journal_of(path).exists():
            calls.append(at)
            if len(calls) > write:
                raise SystemExit
        whole(file, data, at)

    journal._write_all = stop
    try:
        with pytest.raises(SystemExit):
            open_stack(path).write_columns(crash.columns(version))
    finally:
        journal._write_all = whole
    assert journal_of(path).exists()


# ---- which sectors it has


@pytest.mark.parametrize("recent", [1, 3, 1000])
def test_numbers_keep_the_place_they_were_added_at(monkeypatch, recent):
    monkeypatch.setattr(journal, "RECENT", recent)
    numbers = np.random.default_rng(0).permutation(200) * 7 + 2**40
    places = journal.Places()
    for place, number in enumerate(numbers.tolist()):
        assert places.find(number) is None
        assert places.add(number) == place
        assert places.find(number) == place
    assert [places.find(number) for number in numbers.tolist()] == list(range(200))
    assert [places.find(number) for number in (0, 2**40 - 1, 2**40 + 1, 2**50)] == [None] * 4
    assert places.in_order().tolist() == numbers.tolist()
    assert len(places) == 200
    first, stop = 2**40 + 70, 2**40 + 141
    assert sorted(places.within(first, stop)) == [(n, numbers.tolist().index(n)) for n in range(first, stop, 7)]


# ---- the power fails


@pytest.mark.jit_only
@pytest.mark.parametrize("write_back", WAYS)
@pytest.mark.parametrize("version", [1, 2], ids=["new-headers", "headers-in-place"])
def test_after_a_power_cut_at_any_call_all_headers_are_old_or_all_new(tmp_path, stack, version, write_back):
    """At each call the folder as it is, with all dropped that was not synced, and mixtures by sector and name."""
    if version == 2:
        open_stack(stack).write_columns(crash.columns(1))
    before, folder, found, states = crash.contents(stack), tmp_path / "after", [], []
    opened, rng = open_stack(stack), random.Random(7)
    with crash.Disk(tmp_path) as disk:
        with crash.before_each_call(lambda *call: states.append(list(disk.states(rng, 2))), disk.synced):
            opened.write_columns(crash.columns(version), write_back)
        states.append(list(disk.states(rng, 0)))
    for state in (state for at_one_call in states for state in at_one_call):
        folder.mkdir()
        for file, data in state.items():
            (folder / file).write_bytes(data)
        (folder / ".stack.hdf.lock").unlink(missing_ok=True)  # of this process, which lives
        found.append(crash.version_of(str(folder / "stack.hdf"), before))
        shutil.rmtree(folder)
    assert set(found) == {version - 1, version}
    assert found[:4] == [version - 1] * 4
    assert found[-2:] == [version] * 2  # what is written when the call returns is on the disk
    assert len(states) > (5 if write_back == "copy" else 20)


def test_the_last_sector_may_hold_its_new_bytes_before_the_file_has_its_new_length(stack):
    before, size = crash.contents(stack), os.path.getsize(stack)
    assert size % journal.SECTOR  # the sector is no whole one
    leave_journal(stack)
    os.truncate(stack, size)
    last = size // journal.SECTOR
    with open(journal_of(stack), "rb") as file:
        _, new_size, n_sectors, table = journal._load(file.fileno(), str(journal_of(stack)))
        slot = table["sector"][:n_sectors].tolist().index(last)
        file.seek(slot * journal.SECTOR)
        new = file.read(size % journal.SECTOR)
    assert new_size > size
    with open(stack, "r+b") as file:
        file.seek(last * journal.SECTOR)
        assert file.read() != new
        file.seek(last * journal.SECTOR)
        file.write(new)
    assert crash.version_of(stack, before) == 1


@pytest.mark.parametrize("name", ["there", "not-there"])
def test_after_a_power_cut_a_new_stack_is_whole_or_not_there(tmp_path, name):
    path, images, states, found = tmp_path / "new.hdf", np.ones((3, 8, 8)), [], []
    if name == "there":
        write_stack(path, images)
    with crash.Disk(tmp_path) as disk:
        with crash.before_each_call(lambda *call: states.extend(disk.states(random.Random(1), 4)), disk.synced):
            write_stack(path, 2 * images)
        states += disk.states(random.Random(1), 0)
    for state in states:
        if "new.hdf" in state:
            copy = tmp_path / "copy.hdf"
            copy.write_bytes(state["new.hdf"])
            found.append(int(open_stack(copy).read(0, 3).mean()))
        else:
            found.append(0)
    assert set(found) == {int(name == "there"), 2}
    assert found[-2:] == [2, 2]


# ---- the process is killed


def kill(*words):
    """What ``crash`` counts, in a folder whose syncs take no time where there is one."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        done = subprocess.run([sys.executable, crash.__file__, f"{folder}/stack.hdf", *words], capture_output=True,
                              text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.jit_only
@pytest.mark.parametrize("write_back", WAYS)
def test_a_writer_killed_at_any_call_leaves_all_old_or_all_new(write_back):
    count = kill("every-call", write_back)
    assert count["calls"] > (10 if write_back == "copy" else 50)
    assert count["version -1"] + count["version +0"] == count["calls"]
    assert min(count["version -1"], count["version +0"], count["lock"]) > 0
    if write_back == "journal":
        assert min(count["journal"], count["unready"]) > 5


@pytest.mark.jit_only
@pytest.mark.parametrize("write_back", WAYS)
@pytest.mark.parametrize("n", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_writer_killed_at_random_leaves_all_old_or_all_new(write_back, n):
    count = kill("random", write_back, str(n), str(n))
    assert count["kills"] == n
    assert count["with a new version"] > 0
    assert count["copy" if write_back == "copy" else "unready"] > 0


# ---- what is found later


@pytest.mark.parametrize("write", [0, 1, 3])
def test_the_next_command_finishes_a_journal_and_says_so(stack, capsys, write):
    before = crash.contents(stack)
    leave_journal(stack, write=write)
    assert cli.main(["info", stack]) == 0
    assert capsys.readouterr().err == (
        f"mrefali: warning: {stack}: a process ended within a change of the headers, which is finished now\n")
    assert crash.version_of(stack, before) == 1
    assert os.listdir(Path(stack).parent) == ["stack.hdf"]


def test_the_next_command_drops_what_was_not_ready_and_says_so(stack, capsys):
    before = Path(stack).read_bytes()
    Path(f"{journal_of(stack)}.part").write_bytes(b"something")
    assert cli.main(["info", stack]) == 0
    assert capsys.readouterr().err == (
        f"mrefali: warning: {stack}: a process ended before its change of the headers was ready; they are as they "
        "were\n")
    assert Path(stack).read_bytes() == before
    assert os.listdir(Path(stack).parent) == ["stack.hdf"]


@pytest.mark.parametrize("name", ["link.hdf", "stack.hdf"])
def test_a_journal_is_found_through_a_link_too(stack, tmp_path, name):
    before = crash.contents(stack)
    (tmp_path / "link.hdf").symlink_to("stack.hdf")
    leave_journal(stack)
    assert crash.version_of(str(tmp_path / name), before) == 1


def test_a_damaged_journal_is_refused_and_the_stack_left(stack):
    leave_journal(stack, write=2)
    whole, before = journal_of(stack).read_bytes(), Path(stack).read_bytes()
    rng = random.Random(3)
    for _ in range(50):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        journal_of(stack).write_bytes(damaged)
        with pytest.raises(InputError, match=r"\.stack\.hdf\.journal is damaged, .* by removing /"):
            open_stack(stack)
    for size in (0, 1, 100, len(whole) - 1):
        journal_of(stack).write_bytes(whole[:size])
        with pytest.raises(InputError, match="is damaged"):
            open_stack(stack)
    assert Path(stack).read_bytes() == before
    journal_of(stack).write_bytes(whole)
    assert open_stack(stack).column("assign") == [1] * crash.N_IMAGES


def test_a_journal_is_not_written_into_another_file(stack, tmp_path):
    leave_journal(stack)
    write_stack(tmp_path / "other.hdf", np.ones((40, 16, 16)))
    shutil.copyfile(tmp_path / "other.hdf", stack)
    with pytest.raises(InputError, match=f"or is another file: .* by removing {journal_of(stack)}$"):
        open_stack(stack)
    assert Path(stack).read_bytes() == (tmp_path / "other.hdf").read_bytes()


def test_a_stack_restored_from_a_copy_gets_the_change(stack, tmp_path):
    before = crash.contents(stack)
    shutil.copyfile(stack, tmp_path / "backup")
    leave_journal(stack, write=2)
    shutil.copyfile(tmp_path / "backup", stack)
    assert crash.version_of(stack, before) == 1


def test_a_new_stack_in_the_place_of_the_old_has_no_journal(stack):
    leave_journal(stack)
    write_stack(stack, np.ones((40, 16, 16)))
    assert open_stack(stack).n_images == 40
    assert os.listdir(Path(stack).parent) == ["stack.hdf"]


def test_a_stack_that_was_changed_half_way_is_refused(stack):
    open_stack(stack).write_columns(crash.columns(1))
    leave_journal(stack, 98, write=3)  # of the same length, so that the half is a file that HDF5 can open
    with h5py.File(stack, "r+") as file:
        for image in file["MDF/images"].values():
            image.attrs["EMAN.quality"] = 7.0
    before = Path(stack).read_bytes()
    with pytest.raises(InputError, match="may hold half of a change .*, and was changed by another program since"):
        open_stack(stack)
    assert Path(stack).read_bytes() == before
    assert journal_of(stack).exists()


def test_a_journal_that_may_not_be_finished_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/stack.hdf"
        crash.make_stack(path)
        leave_journal(path, write=1)
        os.chmod(folder, 0o555)
        with ordinary_user(), pytest.raises(InputError, match=f"{path} may hold half of a change .*, which {folder}/"
                                            f".stack.hdf.journal completes, but it cannot be written to: have"):
            open_stack(path)
        os.chmod(folder, 0o755)


def test_a_stack_in_a_closed_folder_is_read():
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/stack.hdf"
        crash.make_stack(path)
        os.chmod(path, 0o444)
        os.chmod(folder, 0o555)
        with ordinary_user(), hold(path):
            assert open_stack(path).n_images == crash.N_IMAGES
            assert os.listdir(folder) == ["stack.hdf"]
        os.chmod(folder, 0o755)


def write_lock_of_another(path):
    """A lock of a process that lives and is not this one: the parent."""
    parent = os.getppid()
    about = {"host": lock._host(), "pid": parent, "started": lock._start_of(parent), "since": "now", "command": "x"}
    Path(lock.lock_name(path)).write_text(json.dumps(about))


def test_a_reader_waits_for_the_writer_that_is_at_it(stack):
    before = crash.contents(stack)
    leave_journal(stack, write=1)
    write_lock_of_another(stack)

    def finish():
        time.sleep(0.2)
        with journal._opened(stack, os.O_RDWR) as file:
            journal._apply(file, str(journal_of(stack)))

    writer = threading.Thread(target=finish)
    writer.start()
    assert open_stack(stack).column("assign") == [1] * crash.N_IMAGES
    writer.join()
    os.unlink(lock.lock_name(stack))
    assert crash.version_of(stack, before) == 1


def test_a_reader_does_not_wait_for_ever(stack, monkeypatch):
    leave_journal(stack)
    write_lock_of_another(stack)
    monkeypatch.setattr(journal, "PATIENCE_S", 0.1)
    with pytest.raises(InputError, match=f"stack.hdf is being written to by process {os.getppid()} on .*: wait for it"):
        open_stack(stack)


def test_what_a_writer_prepares_is_left_alone(stack):
    Path(f"{journal_of(stack)}.part").write_bytes(b"something")
    write_lock_of_another(stack)
    assert open_stack(stack).n_images == crash.N_IMAGES
    assert Path(f"{journal_of(stack)}.part").exists()


# ---- the disk fails


FAILURES = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS]


@pytest.mark.parametrize("write_back", WAYS)
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "from-then-on"])
def test_a_call_that_fails_is_one_line_and_leaves_all_old_or_all_new(stack, write_back, for_ever):
    """Each call in turn; a full disk, a quota, a failing disk, a network folder that is gone, a read-only one."""
    whole, before, messages = Path(stack).read_bytes(), crash.contents(stack), []
    while True:
        Path(stack).write_bytes(whole)
        at, number, calls = len(messages), FAILURES[len(messages) % len(FAILURES)], []
        message = fail_at(stack, write_back, at, number, for_ever, calls)
        if message is None:
            assert calls[at:] in ([], ["unlink"])  # nothing was left to fail but the removal of the lock
            break
        assert os.strerror(number) in message
        assert "\n" not in message
        messages.append(message)
        assert crash.version_of(stack, before) in (0, 1)
        for left in Path(stack).parent.iterdir():
            if left.name != "stack.hdf":
                left.unlink()
    assert len(messages) >= (5 if write_back == "copy" else 20)
    assert any("which is whole all the same" in message for message in messages)
    assert write_back == "copy" or any("the rest, which is written when" in message for message in messages)


def fail_at(path, write_back, at, number, for_ever, calls):
    """Write headers with call ``at`` failing; the message, None if all is well."""
    whole, opened = Path(path).read_bytes(), open_stack(path)

    def fail(name, arguments):
        calls.append(name)
        if len(calls) == at + 1 or (for_ever and len(calls) > at):
            raise OSError(number, os.strerror(number))

    try:
        with crash.before_each_call(fail):
            opened.write_columns(crash.columns(1), write_back)
    except OSError as error:
        if "replace" not in calls[:at]:  # by which a change begins to count
            assert Path(path).read_bytes().rstrip(b"\0") == whole.rstrip(b"\0")  # room that was made may stay
        return str(error)
    finally:
        Path(lock.lock_name(path)).unlink(missing_ok=True)  # that could not be removed
    return None


def test_an_interrupt_while_the_journal_is_applied_waits_for_its_end(stack, monkeypatch):
    before, whole, interrupted = crash.contents(stack), journal._write_all, []

    def interrupt(file, data, at):
        whole(file, data, at)
        if journal_of(stack).exists() and not interrupted:
            interrupted.append(at)
            raise KeyboardInterrupt

    monkeypatch.setattr(journal, "_write_all", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_stack(stack).write_columns(crash.columns(1))
    assert interrupted
    assert os.listdir(Path(stack).parent) == ["stack.hdf"]
    assert crash.version_of(stack, before) == 1
