"""Two runs on one stack: the second is told at once who has it, and a lock whose process is gone is no lock."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small

from mrefali import cli
from mrefali.errors import InputError
from mrefali.io import hold, lock, open_stack


@pytest.fixture
def stack(tmp_path):
    return small.write(tmp_path)[0]


HOLDER = """
import sys, time
from mrefali.io import hold
with hold(sys.argv[1]):
    print(flush=True)
    time.sleep(99)
"""


@pytest.fixture
def other(stack):
    """Another process, which holds the lock until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, stack], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def lock_of(stack):
    return Path(lock.lock_name(stack))


def test_a_lock_says_host_process_start_and_command(stack):
    with hold(stack):
        about = json.loads(lock_of(stack).read_text())
        assert about["host"].split()[0] == socket.gethostname()
        assert (about["pid"], about["started"]) == (os.getpid(), lock._start_of(os.getpid()))
        assert set(about) == {"host", "pid", "started", "since", "command"}
    assert not lock_of(stack).exists()


def test_the_second_is_told_who_has_it_and_changes_nothing(stack, other, capsys, tmp_path):
    before = small.snapshot(tmp_path)
    for words in (["header", stack, "--params=assign", "--zero"],
                  ["mref_ali2d", stack, str(tmp_path / "refs.hdf"), str(tmp_path / "out"), *small.WORDS]):
        assert cli.main(words) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"mrefali: error: {stack} is in use by process {other.pid} on {socket.gethostname()} ")
        assert err.endswith("): wait for it, or end it\n")
    assert small.snapshot(tmp_path) == before


def test_what_only_reads_is_not_kept_out(stack, other):
    assert cli.main(["info", stack]) == 0
    assert cli.main(["header", stack, "--params=xform.align2d", "--print"]) == 0


def test_a_lock_whose_process_was_killed_is_taken_over_and_that_is_said(stack, other, capsys):
    other.kill()
    other.wait()
    assert cli.main(["header", stack, "--params=assign", "--zero"]) == 0
    assert capsys.readouterr().err.startswith(
        f"mrefali: warning: {stack}: the lock of process {other.pid} on {socket.gethostname()} since ")
    assert open_stack(stack).column("assign") == [0] * small.N_PARTICLES
    assert not lock_of(stack).exists()


def test_a_process_that_waits_to_be_reaped_has_ended(stack, other):
    os.kill(other.pid, signal.SIGKILL)
    while lock._start_of(other.pid) != -1:
        time.sleep(0.01)
    with hold(stack):
        assert json.loads(lock_of(stack).read_text())["pid"] == os.getpid()


def test_a_process_of_the_same_number_that_began_later_is_another(stack):
    parent = os.getppid()
    about = {"host": lock._host(), "pid": parent, "started": lock._start_of(parent) - 1, "since": "x", "command": "y"}
    lock_of(stack).write_text(json.dumps(about))
    with hold(stack):
        assert json.loads(lock_of(stack).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("host", ["elsewhere pid:[4026531836]", "elsewhere", None])
def test_a_lock_of_another_host_is_refused_with_the_way_out(stack, host):
    lock_of(stack).write_text(json.dumps({"host": host, "pid": 2**22, "started": 5, "since": "monday", "command": "c"}))
    message = (rf"process 4194304 on {str(host).split()[0]} since monday \(c\): wait for it, or, if it does not run "
               rf"there any more, remove {lock_of(stack)}$")
    with pytest.raises(InputError, match=message), hold(stack):
        pass
    assert lock_of(stack).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"pid": "4"}', "\0\0"])
def test_a_lock_that_names_nobody_is_refused_with_the_way_out(stack, text, monkeypatch):
    monkeypatch.setattr(lock, "ROUNDS", 2)
    lock_of(stack).write_text(text)
    with pytest.raises(InputError, match=f"stack.hdf is locked by .*, which does not say by what process: .* remove "
                                         f"{lock_of(stack)}$"), hold(stack):
        pass
    assert lock_of(stack).read_text() == text


def test_a_lock_within_a_lock_is_the_same(stack):
    with hold(stack):
        open_stack(stack).write_columns({"assign": [0] * small.N_PARTICLES})
        assert lock_of(stack).exists()
    assert not lock_of(stack).exists()


def test_a_link_and_its_target_have_one_lock(stack, tmp_path, other):
    (tmp_path / "link.hdf").symlink_to("stack.hdf")
    link = str(tmp_path / "link.hdf")
    with pytest.raises(InputError, match=f"link.hdf is in use by process {other.pid}"), hold(link):
        pass


def test_a_lock_that_cannot_be_filled_does_not_stay(stack, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="No space left"), hold(stack):
        pass
    assert not lock_of(stack).exists()


RACE = """
import sys, time
from mrefali.errors import InputError
from mrefali.io import hold
path, counter = sys.argv[1:]
for _ in range(100):
    try:
        with hold(path):
            with open(counter) as file:
                n = int(file.read())
            with open(counter, "w") as file:
                file.write(str(n + 1))
    except InputError:
        continue
    print("held")
"""


def test_of_many_that_try_at_once_one_at_a_time_holds_it(stack, tmp_path):
    """Each that holds it adds one to a number, which would lose some if two could."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", RACE, stack, counter], stdout=subprocess.PIPE, text=True,
                                  stderr=subprocess.PIPE) for _ in range(4)]
    said = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    held = sum(out.count("held") for out, _ in said)
    assert int(counter.read_text()) == held > 20
