"""How long a user waits, all caches warm: for ``mrefali --help``, and for the first iteration of a run to begin."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mrefali import simulate

MREFALI = str(Path(sys.executable).parent / "mrefali")
REPEATS = 7


def help_seconds():
    """From the call of ``mrefali --help`` to its end."""
    began = time.perf_counter()
    subprocess.run([MREFALI, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_iteration_seconds(folder, number):
    """From the call of a run to the line that it prints just before its first iteration."""
    began = time.perf_counter()
    call = [MREFALI, "mref_ali2d", "particles.hdf", "particles_views.hdf", f"out{number}", "--ou=27",
            "--xr=3", "--yr=3", "--maxit=1"]
    with subprocess.Popen(call, cwd=folder, stdout=subprocess.PIPE, text=True) as run:
        run.stdout.readline()
        seconds = time.perf_counter() - began
        run.communicate()
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(call)} ended with status {run.returncode}")
    return seconds


def main():
    with tempfile.TemporaryDirectory() as folder:
        simulate(Path(folder, "particles.hdf"), 1000, 3)
        help_seconds(), first_iteration_seconds(folder, 0)  # fills the caches
        helps = [help_seconds() for _ in range(REPEATS)]
        starts = [first_iteration_seconds(folder, 1 + i) for i in range(REPEATS)]
    print(f"medians of {REPEATS}: mrefali --help {np.median(helps):.2f} s; to the first iteration on 1000 particles of "
          f"64 px {np.median(starts):.2f} s")


if __name__ == "__main__":
    main()
