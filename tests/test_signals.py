"""Signals end a run cleanly: the last line says where things stand, the status is 128 plus the signal's number."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
from test_io_hdf import contents

from mrefali import cli, signals
from mrefali.errors import Stopped
from mrefali.io import open_stack
from mrefali.run import stopping_with

MPIEXEC = Path(sys.executable).parent / "mpiexec"
pytestmark = pytest.mark.jit_only  # whole runs

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]

#: The main job with an iteration that never ends, or with a compilation that swallows what is raised in it.
SLOW = """
import sys, time
from mrefali import aligner, cli, warmup
place, *words = sys.argv[1:]
whole, search = aligner.align, warmup.align
def endless(*arguments):
    if place == "second" and not hasattr(aligner, "began"):
        aligner.began = True
    elif place in ("first", "second"):
        print("here", flush=True)
        while True:
            time.sleep(0.01)
    return whole(*arguments)
def swallow(*arguments):
    if place == "compiling":
        print("here", flush=True)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
    return search(*arguments)
aligner.align, warmup.align = endless, swallow
sys.exit(cli.main(["mref_ali2d", *words]))
"""


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """The search is in the cache, so that a run comes to its iterations at once."""
    folder = tmp_path_factory.mktemp("compiled")
    small.write(folder)
    names = [str(folder / name) for name in ("stack.hdf", "refs.hdf", "out")]
    assert cli.main(["mref_ali2d", *names, *small.WORDS, "--maxit=1"]) == 0


@pytest.fixture
def files(tmp_path):
    return *small.write(tmp_path), str(tmp_path / "out")


def stop(files, place, number, *words, launcher=()):
    """Send a signal once the run is there; its status, and the lines of stderr that are ours and no warning."""
    call = [sys.executable, "-c", SLOW, place, *files, *small.WORDS, "--maxit=3", *words]
    process = subprocess.Popen([*launcher, *call],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        while "here" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    lines = [line for line in err.splitlines() if line.startswith("mrefali:") and "warning" not in line]
    # Python itself reports an exception that comes within a weak reference's end, and goes on
    assert "Traceback" not in err.partition("Exception ignored in")[0]
    return process.returncode, lines


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("place", "state"), [
    ("compiling", "no iteration was begun, and nothing was created or changed"),
    ("first", "0 of 3 iterations are finished in {2}, and {0} is as it was; the same call with --resume goes on from "
              "there"),
    ("second", "1 of 3 iterations are finished in {2}, and {0} is as it was; the same call with --resume goes on from "
               "there"),
])
def test_a_signal_ends_a_run_which_says_where_it_stands(files, place, state, number):
    before = contents(files[0])
    status, lines = stop(files, place, number)
    assert status == 128 + number
    assert lines == [f"mrefali: stopped by {number.name}: {state.format(*files)}"]
    assert contents(files[0]) == before
    assert os.path.exists(files[2]) is (place != "compiling")
    left = {"stack.hdf", "refs.hdf", "out"} if place != "compiling" else {"stack.hdf", "refs.hdf"}
    assert set(os.listdir(Path(files[0]).parent)) == left
    if place != "compiling":
        assert " ERROR   the run ended by Stopped: " in (Path(files[2]) / "mrefali.log").read_text()
        assert cli.main(["mref_ali2d", *files, *small.WORDS, "--maxit=3", "--resume"]) == 0
        assert len(set(open_stack(files[0]).column("assign"))) == 2


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_mpiexec_ends_all_ranks(files, number):
    before = contents(files[0])
    status, lines = stop(files, "second", number, "--MPI", launcher=[MPIEXEC, "-n", "2"])
    assert status == 128 + number
    assert len(lines) == 1
    assert re.fullmatch(f"mrefali: stopped by {number.name}: [01] of 3 iterations are finished in .*/out, and .* is as "
                        "it was; the same call with --resume goes on from there", lines[0])
    assert contents(files[0]) == before
    assert not (Path(files[0]).parent / ".stack.hdf.lock").exists()


def test_what_is_raised_where_it_is_lost_is_raised_again():
    with signals.stopping():
        with pytest.raises(Stopped, match="^stopped by SIGTERM: what it was writing is there whole, or not at all$"):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            signals.check()
        signal.raise_signal(signal.SIGTERM)  # a launcher repeats it: no second exception within what cleans up
    signals.check()


def test_a_second_ctrl_c_ends_what_lost_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with signals.stopping():
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)
        now[0] += 0.9
        signal.raise_signal(signal.SIGINT)
        now[0] += 1.1
        with pytest.raises(Stopped, match="^stopped by SIGINT"):
            signal.raise_signal(signal.SIGINT)


def test_an_exception_that_took_the_place_of_the_signals_is_not_the_end():
    """As of a compiler that is interrupted within, and then misses what it has not finished."""
    def compile_():
        with signals.stopping():
            try:
                signal.raise_signal(signal.SIGUSR1)
            finally:
                raise RuntimeError("no compiled object yet")

    with pytest.raises(Stopped, match="^stopped by SIGUSR1: "):
        compile_()

    def run():
        with signals.stopping(), stopping_with(lambda: "two are finished"):
            compile_within()

    def compile_within():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("no compiled object yet") from None

    with pytest.raises(Stopped, match="^stopped by SIGTERM: two are finished$"):
        run()


def test_without_a_signal_an_exception_stays_what_it_is():
    with pytest.raises(ZeroDivisionError), signals.stopping(), stopping_with(lambda: "two are finished"):
        1 / 0  # noqa: B018


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in signals.ENDING]
    with signals.stopping():
        assert signal.getsignal(signal.SIGUSR1) not in before
    assert [signal.getsignal(number) for number in signals.ENDING] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.stopping():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGINT, before)
