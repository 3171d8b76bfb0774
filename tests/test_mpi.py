"""The main job on two MPI ranks: the same bits as one process; started without --MPI it is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from test_io_hdf import contents

import mrefali
from mrefali.io import open_stack

MPIEXEC = Path(sys.executable).parent / "mpiexec"

pytestmark = pytest.mark.skipif(not MPIEXEC.exists(), reason="needs pip install 'mrefali[mpi]'")


def launch(*words, ranks=2):
    """The finished ``mpiexec -n RANKS mrefali mref_ali2d ...``; a hang fails the test."""
    return subprocess.run([MPIEXEC, "-n", str(ranks), sys.executable, "-m", "mrefali", "mref_ali2d", *words],
                          capture_output=True, text=True, timeout=120)


def write(folder):
    folder.mkdir()
    return *small.write(folder), str(folder / "out")


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "mpi")


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("vanishing", [False, True])
def test_ranks_find_what_one_process_finds_to_the_bit(tmp_path, files, ranks, vanishing):
    stack, refs, outdir = files
    one = write(tmp_path / "serial")
    if vanishing:
        for path in (refs, one[1]):
            mrefali.write_stack(path, np.stack([*small.references(), -small.references()[0]]))
    done = launch(*files, *small.WORDS, "--maxit=2", "--MPI", ranks=ranks)
    assert (done.returncode, done.stderr) == (0, "")
    mrefali.mref_ali2d(*one, maxit=2, **small.OPTIONS)
    assert sorted(os.listdir(outdir)) == sorted(os.listdir(one[2]))
    for name in ("poses.csv", "history.csv", "drm0000000.txt"):
        assert (Path(outdir) / name).read_bytes() == (Path(one[2]) / name).read_bytes()
    for name in ("aqm000.hdf", "aqm001.hdf", "multi_ref.hdf"):
        assert contents(Path(outdir) / name) == contents(Path(one[2]) / name)
    assert contents(stack) == contents(one[0])
    assert (0 in open_stack(Path(outdir) / "aqm000.hdf").column("ave_n")) is vanishing


def test_ranks_report_once_and_say_how_many_they_are(files):
    done = launch(*files, *small.WORDS, "--maxit=1", "--MPI")
    assert done.stdout.count("iteration 1/1") == 1
    assert done.stdout.count("search for a centred particle") == 1
    assert " ranks: 2\n" in (Path(files[2]) / "mrefali.log").read_text()


def test_ranks_check_once_and_touch_nothing(files):
    before = Path(files[0]).read_bytes()
    done = launch(*files, *small.WORDS, "--MPI", "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("MB of memory a rank") == 1
    assert "2 ranks" in done.stdout
    assert Path(files[0]).read_bytes() == before
    assert not os.path.exists(files[2])


def test_ranks_without_mpi_are_refused(files):
    before = Path(files[0]).read_bytes()
    done = launch(*files, *small.WORDS)
    assert done.returncode == 2
    assert "MPI=False, but a launcher started 2 processes" in done.stderr
    assert "give --MPI" in done.stderr
    assert "Traceback" not in done.stderr
    assert Path(files[0]).read_bytes() == before
    assert not os.path.exists(files[2])


@pytest.mark.parametrize("index", [0, small.N_PARTICLES - 1], ids=["of-rank-0", "of-rank-1"])
def test_all_ranks_refuse_a_bad_pixel_of_any(files, index):
    particles = small.particles()
    particles[index, 2, 3] = np.nan
    stack = open_stack(files[0])
    mrefali.write_stack(files[0], particles, [stack.header(i) for i in range(stack.n_images)])
    done = launch(*files, *small.WORDS, "--MPI")
    assert done.returncode == 2
    assert f"image {index} has a NaN or infinite pixel" in done.stderr
    assert "Traceback" not in done.stderr
    assert not os.path.exists(files[2])


def test_all_ranks_refuse_an_outdir_that_exists(files):
    os.mkdir(files[2])
    done = launch(*files, *small.WORDS, "--MPI")
    assert done.returncode == 2
    assert "out: the output directory exists already" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(files[2]) == []
