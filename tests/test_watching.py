"""``mrefali watch``: what it says of a run at work, finished, failed or silent; and how it ends."""

import contextlib
import datetime
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import finished
import pexpect
import pytest
import small

import mrefali
from mrefali import cli, signals, watching
from mrefali.errors import InputError

SCRIPTS = Path(sys.executable).parent
START = datetime.datetime(2026, 1, 1, 12)


def at_work(folder, seconds=(10, 20), **options):
    """A run of five iterations at work, with its log; the run and the time of the last line."""
    outdir = finished.write(folder, finished=False, n_iterations=len(seconds), maxit=5, **options)
    when, lines = START, [f"{START},000 INFO    60 particles of 32 x 32 px"]
    for i, took in enumerate(seconds):
        when += datetime.timedelta(seconds=took)
        lines.append(f"{when},000 INFO    iteration {i} ({i + 1} of 5): criterion 1")
    Path(outdir, "mrefali.log").write_text("\n".join(lines) + "\n")
    return mrefali.open_run(outdir), when


def after(when, seconds):
    return when + datetime.timedelta(seconds=seconds)


def test_a_run_at_work_has_time_left_and_speed(tmp_path):
    run, when = at_work(tmp_path)
    assert watching.iteration_seconds(run.log) == {0: 10.0, 1: 20.0}
    first = watching.describe(run, after(when, 5)).splitlines()[0]
    # 3 iterations of 15 s, 5 s of the first gone; 60 particles in 15 s
    assert first == f"{run.path}: in iteration 2 (3 of 5), about 40 s left, 15 s an iteration, 4 particles/s"


def test_a_silent_run_is_not_said_to_be_at_work(tmp_path):
    run, when = at_work(tmp_path)
    assert "2 of 5 iterations, then silent for 0:03:20: the run may have been killed" in watching.describe(
        run, after(when, 200))


def test_the_first_iteration_is_timed_without_the_compilation(tmp_path):
    run, when = at_work(tmp_path, seconds=())
    first = watching.describe(run, after(when, 130)).splitlines()[0]
    assert first.endswith("in the first of 5 iterations, for 0:02:10")


def test_counts_changes_and_warnings_are_shown(tmp_path):
    outdir = finished.write(tmp_path, n_classes=20, n_particles=300, vanished=(6,))
    with open(f"{outdir}/mrefali.log", "a") as file:
        file.writelines(f"2026-01-01 00:00:00,000 WARNING number {i} \x1b[2J\n" for i in range(5))
    run = mrefali.open_run(outdir)
    text = watching.describe(run, START)
    counts = run.counts[-1]
    assert text.startswith(f"{outdir}: finished after 2 iterations")
    assert f"{counts.min()}/{sorted(counts)[9]}" in text.replace(".5", "")
    assert "class particles, the largest 12 of 20" in text
    assert f"{run.by_size[0]:>5} {counts.max():>9} {'█' * 30}" in text
    assert "the last 3 of 5 warnings:" in text
    assert "number 4" in text
    assert "number 1" not in text
    assert "\x1b" not in text


def test_a_pipe_sees_one_look(tmp_path):
    outdir = finished.write(tmp_path, finished=False)
    done = subprocess.run([SCRIPTS / "mrefali", "watch", outdir], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("iteration    criterion") == 1
    assert "\x1b" not in done.stdout


def test_a_terminal_follows_the_run_to_its_end(tmp_path):
    run, _ = at_work(tmp_path)
    outdir = run.path
    child = pexpect.spawn(str(SCRIPTS / "mrefali"), ["watch", outdir, "--every=0.2"], timeout=60)
    child.expect("2 of 5 iterations, then silent")
    child.expect("2 of 5 iterations, then silent")  # it looks again
    shutil.copy(f"{outdir}/aqm001.hdf", f"{outdir}/multi_ref.hdf")
    child.expect("finished after 2 iterations")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_ends_the_watching_and_says_that_the_run_goes_on(tmp_path):
    outdir = finished.write(tmp_path, finished=False)
    # what starts the tests in the background may ignore the signal, and have its children do so
    child = pexpect.spawn(str(SCRIPTS / "mrefali"), ["watch", outdir], timeout=60,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    child.expect("class particles")
    child.sendintr()
    child.expect("no longer watching; the run is not touched")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_ctrl_c_that_is_lost_while_files_are_read_ends_the_watching_too(tmp_path, monkeypatch, capsys):
    outdir = finished.write(tmp_path, finished=False)

    def describe(run, now):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return "looked"

    monkeypatch.setattr(watching, "describe", describe)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with signals.stopping():
        watching.watch(outdir, every=60)
    assert capsys.readouterr().out.endswith("no longer watching; the run is not touched\n")


@pytest.mark.jit_only
def test_a_real_run_is_watched_from_beside_it(tmp_path):
    """A run in a thread, slowed by nothing, and its state read over and over: never an error, and every state seen."""
    stack, refs = small.write(tmp_path)
    worker = threading.Thread(target=mrefali.mref_ali2d, args=(stack, refs, str(tmp_path / "out")),
                              kwargs=small.OPTIONS | {"maxit": 8})
    worker.start()
    seen = set()
    while worker.is_alive():
        if os.path.exists(tmp_path / "out/parameters.json"):
            run = mrefali.open_run(tmp_path / "out")
            watching.describe(run, datetime.datetime.now())
            seen.add(run.n_iterations)
        time.sleep(0.005)
    worker.join()
    assert len(seen) > 2
    assert "finished after 8 iterations" in watching.describe(mrefali.open_run(tmp_path / "out"), START)
    assert set(watching.iteration_seconds(mrefali.open_run(tmp_path / "out").log)) == set(range(8))


def test_what_cannot_be_watched_is_refused(tmp_path, capsys):
    assert cli.main(["watch", str(tmp_path / "none")]) == 2
    assert "no such directory: give the OUTDIR of a run" in capsys.readouterr().err
    with pytest.raises(InputError, match="every=0 is not allowed: give seconds above 0"):
        mrefali.watch(tmp_path, every=0)
