"""A run of many iterations holds no more memory, files or threads than one of few."""

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import small

import mrefali
from mrefali import outdir

#: What the heap of Python and numpy may grow by, in bytes, over all the iterations that are looked at.
GROWTH = 4 << 20


def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.jit_only
@pytest.mark.parametrize("n", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_iterations_leak_nothing(tmp_path, monkeypatch, n):
    """Held against each other: a tenth of the way and the end; headers are saved after every fifth iteration."""
    stack, refs = small.write(tmp_path)
    seen, write = [], outdir.OutputDirectory.write_iteration

    def watch(self, iteration):
        write(self, iteration)
        seen.append((len(os.listdir("/proc/self/fd")), threading.active_count(),
                     len(os.listdir("/proc/self/task")), resident()))

    monkeypatch.setattr(outdir.OutputDirectory, "write_iteration", watch)
    mrefali.mref_ali2d(stack, refs, str(tmp_path / "out"), maxit=n, save_every=5, quiet=True, **small.OPTIONS)
    assert len(seen) == n
    files, threads, tasks, memory = np.array(seen[n // 10:]).T
    assert (files.min(), threads.min(), tasks.min()) == (files.max(), threads.max(), tasks.max())
    assert memory[-1] - memory[0] < GROWTH
    assert not any("." == name[0] for name in os.listdir(tmp_path / "out"))
