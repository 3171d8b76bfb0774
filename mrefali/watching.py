"""The state of a run, from another terminal (the command ``watch``). Reads the files of the run; imports results."""

import datetime
import os
import re
import sys
import time

import numpy as np

from mrefali import signals
from mrefali.errors import InputError
from mrefali.results import open_run

ITERATION = re.compile(r"iteration (\d+) \(")

#: Iterations, classes and warnings shown, and the width of a bar.
MOST_ITERATIONS, MOST_CLASSES, MOST_WARNINGS, BAR = 8, 12, 3, 30

#: An unfinished run is thought dead when it was silent so many times as long as an iteration takes, and a minute.
SILENT = 5


def watch(outdir, *, every=2.0, once=False):
    """Show the state of a run until it ends; in a file or a pipe, or with ``once``, a single time.

    Parameters
    ----------
    outdir : str
    every : float, s
        Time between two looks.
    once : bool

    Raises
    ------
    InputError, FileNotFoundError
    """
    if not every > 0:
        raise InputError(f"every={every} is not allowed: give seconds above 0")
    if once or not sys.stdout.isatty():
        print(describe(open_run(outdir), datetime.datetime.now()))
        return
    try:
        while True:
            run = open_run(outdir)
            ended = run.state != "unfinished"  # before it is shown: what ends meanwhile is shown once more
            # from the upper left, clearing what is left of each line and below: no flicker
            text = describe(run, datetime.datetime.now()).replace("\n", "\x1b[K\n")
            print(f"\x1b[H{text}\x1b[K\n\x1b[J", end="", flush=True)
            if ended:
                return
            signals.check()  # one that came while files were read may be lost
            time.sleep(every)
    except KeyboardInterrupt:
        print("\nno longer watching; the run is not touched")


def describe(run, now):
    """The state of a run in lines, str; ``now`` is a ``datetime``."""
    lines = [f"{run.path}: {_state(run, now)}",
             f"{run.n_particles} particles, {run.n_references} classes, {run.box} x {run.box} px", ""]
    if run.n_iterations:
        lines += [*_iterations(run), "", *_classes(run)]
    warnings = [message for _, level, message in run.log if level in ("WARNING", "ERROR")]
    if warnings:
        hidden = f"the last {MOST_WARNINGS} of {len(warnings)} " if len(warnings) > MOST_WARNINGS else ""
        lines += ["", f"{hidden}warnings:", *(f"  {_printable(message)}" for message in warnings[-MOST_WARNINGS:])]
    return "\n".join(lines).rstrip()


def _state(run, now):
    if run.state != "unfinished":
        return f"{run.state} after {run.n_iterations} iterations"
    seconds = list(iteration_seconds(run.log).values())[:run.n_iterations]
    silent = (now - run.log[-1][0]).total_seconds() if run.log else 0.0
    if run.n_iterations and not seconds:
        return f"{run.n_iterations} of {run.maxit} iterations"  # its log is gone
    if not seconds:
        return f"in the first of {run.maxit} iterations, for {_duration(silent)}"
    usual = float(np.median(seconds))
    if silent > SILENT * usual + 60:
        return (f"{run.n_iterations} of {run.maxit} iterations, then silent for {_duration(silent)}: "
                "the run may have been killed")
    left = max(0.0, usual * (run.maxit - run.n_iterations) - min(silent, usual))
    return (f"in iteration {run.n_iterations} ({run.n_iterations + 1} of {run.maxit}), about {_duration(left)} left, "
            f"{_duration(usual)} an iteration, {run.n_particles / max(usual, 1e-3):.0f} particles/s")


def iteration_seconds(log):
    """Seconds that each iteration took, by its number, from the times in the log of a run; a dict of float."""
    seconds, before = {}, log[0][0] if log else None
    for when, level, message in log:
        match = ITERATION.match(message) if level == "INFO" else None
        if match:
            seconds[int(match[1])] = (when - before).total_seconds()
            before = when
        elif not seconds:
            before = when  # compiling and checks are no part of the first
    return seconds


def _iterations(run):
    yield "iteration    criterion   changed  smallest/median/largest  vanished  median resolution (FRC 0.5)"
    for i in range(max(0, run.n_iterations - MOST_ITERATIONS), run.n_iterations):
        counts, resolution = run.counts[i], run.resolution_05_px[i]
        known = resolution[~np.isnan(resolution)]
        sizes = f"{counts.min()}/{np.median(counts):g}/{counts.max()}"
        changed = "–" if i == 0 else f"{100 * run.changed[i].sum() / run.n_particles:.1f} %"
        yield (f"{i:>9} {run.criterion[i]:>12.6g} {changed:>9}  {sizes:>23} {np.isnan(resolution).sum():>9}  "
               f"{run.in_words(np.median(known)) if known.size else '–'}")


def _classes(run):
    shown = run.by_size[:MOST_CLASSES]
    rest = f", the largest {MOST_CLASSES} of {run.n_references}" if len(shown) < run.n_references else ""
    yield f"class particles{rest}"
    largest = max(run.counts[-1].max(), 1)
    for k in shown:
        count = run.counts[-1, k]
        yield f"{k:>5} {count:>9} {'█' * round(BAR * count / largest)}"


def _duration(seconds):
    return f"{seconds:.0f} s" if seconds < 120 else str(datetime.timedelta(seconds=round(seconds)))


def _printable(message):
    """A message without what would move the cursor of a terminal, on one line no longer than it."""
    text = "".join(c if c.isprintable() else " " for c in message)
    width = os.get_terminal_size().columns - 2 if sys.stdout.isatty() else len(text)
    return text if len(text) <= width else text[:width - 1] + "…"
