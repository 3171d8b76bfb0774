"""Reference-free alignment: the first average, the truth found without a reference, the same bits however it is run."""

import os
import re

import numpy as np
import pytest
import small
from test_checkpoint import Crash, assert_same, end_within
from test_mpi import MPIEXEC, launch_python, same_files

import mrefali
from mrefali import average, cli, refine
from mrefali.accuracy import compare
from mrefali.errors import InputError
from mrefali.geometry import disc, identity_poses, make_poses, to_matrices
from mrefali.io import open_stack, write_stack
from mrefali.simulation import read_truth, simulate

WORDS = ["--ou=6", "--xr=2 1", "--ts=1 0.5", "--maxit=2"]
OPTIONS = {"ou": 6, "xr": (2, 1), "ts": (1, 0.5), "maxit": 2, "quiet": True}


def write(folder, poses=None):
    """``stack.hdf`` of one job of ``small``, and the name of an OUTDIR beside it."""
    folder.mkdir()
    stack, refs = small.write(folder)
    os.remove(refs)
    if poses is not None:
        open_stack(stack).write_columns({"xform.align2d": poses})
    return stack, str(folder / "out")


@pytest.fixture
def first_averages(monkeypatch):
    """What each run began with: pairs of references and poses."""
    begun, whole = [], refine.first_state

    def note(references, poses, *rest):
        begun.append((references, poses))
        return whole(references, poses, *rest)

    monkeypatch.setattr("mrefali.run.first_state", note)
    return begun


def test_the_first_reference_is_the_average_by_the_poses_in_the_headers(tmp_path, first_averages):
    stack, out = write(tmp_path / "run")
    mrefali.ali2d(stack, out, function="ref_unfiltered", center=0, **OPTIONS)
    (reference,), poses = first_averages[0]
    assert poses.tobytes() == open_stack_before(out).tobytes()
    images, inside = small.particles(), disc(small.BOX, 6)
    average.normalize_particles(images, inside)
    mean = average.transform(images, poses).mean(axis=0, dtype=np.float64)
    # fixed point and float32 leave 2^-24 of pixels of up to 4
    np.testing.assert_allclose(reference, (mean - mean[inside].mean()) * inside, atol=1e-6)


def open_stack_before(out):
    """The poses that a run found in its stack, (n,) POSE."""
    table = small.read_table(os.path.join(out, "poses_before.csv"))
    return make_poses(*(np.array(table[name]) for name in ("alpha", "sx", "sy")), np.array(table["mirror"], int))


def test_particles_that_were_never_moved_are_turned_at_random_by_the_seed(tmp_path, first_averages):
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        stack, out = write(tmp_path / name, identity_poses(small.N_PARTICLES))
        mrefali.ali2d(stack, out, center=0, rand_seed=seed, **(OPTIONS | {"xr": 0, "ts": 1, "maxit": 1}))
        assert open_stack_before(out).tobytes() == identity_poses(small.N_PARTICLES).tobytes()
    (a, turned), (again, _), (b, _) = first_averages
    assert len(np.unique(turned["alpha"])) == small.N_PARTICLES
    assert [name for name in ("sx", "sy", "mirror") if turned[name].any()] == []
    assert a.tobytes() == again.tobytes() != b.tobytes()


def test_the_shift_that_centres_the_first_average_is_in_the_poses(tmp_path, first_averages):
    poses = make_poses(0.0, np.full(small.N_PARTICLES, 1.5), -0.5)
    stack, out = write(tmp_path / "run", poses)
    mrefali.ali2d(stack, out, center=-1, **OPTIONS)
    # the mean shift is all there is of a shift, and centring takes it away
    np.testing.assert_allclose([first_averages[0][1]["sx"], first_averages[0][1]["sy"]], 0, atol=1e-6)


@pytest.mark.jit_only
@pytest.mark.parametrize("seed", [1, 2])
def test_particles_of_one_view_find_their_poses_without_a_reference(tmp_path, seed):
    stack, out = str(tmp_path / "s.hdf"), str(tmp_path / "out")
    simulate(stack, 200, 1, 48, snr=0.3, max_shift=3.0, seed=seed)
    assert cli.main(["ali2d", stack, out, "--ou=18", "--quiet"]) == 0
    found = open_stack(stack)
    true_classes, true_poses = read_truth(tmp_path / "s_truth.csv")
    result = compare(found.column("assign"), found.poses(), true_classes, true_poses, 1, 1)
    assert result.mirror_share > 0.98
    assert result.gross_share < 0.02
    assert result.angle_error_rms < 3
    assert result.shift_error_rms < 0.5
    run = mrefali.open_run(out)
    assert (run.n_references, run.state) == (1, "finished")
    assert run.criterion[-1] > run.criterion[0]


def test_what_comes_out_is_that_of_an_alignment_of_one_class(tmp_path, capsys):
    stack, out = write(tmp_path / "run")
    assert cli.main(["ali2d", stack, out, *WORDS]) == 0
    said = capsys.readouterr().out
    assert f"{small.N_PARTICLES} particles of 20 x 20 px, 1 reference, rings 1 to 6 px" in said
    assert "y -2 to 2 px, in steps of 1 px" in said  # yr is as xr
    assert "y -1 to 1 px, in steps of 0.5 px" in said
    assert said.count("criterion") == 4
    assert open_stack(stack).column("assign") == [0] * small.N_PARTICLES
    assert open_stack(os.path.join(out, "multi_ref.hdf")).column("ave_n") == [small.N_PARTICLES]
    run = mrefali.open_run(out)
    assert (run.parameters["xr"], run.parameters["yr"]) == ([2, 1], [2, 1])
    page = (tmp_path / "run/out/report.html").read_text("utf-8")
    assert re.search("search ±<b>2.* 1.*</b>, ±<b>2.* 1.*</b> px", page)
    assert run.plot_shifts() is not None


def test_the_defaults_are_the_originals(monkeypatch):
    calls = []
    monkeypatch.setattr("mrefali.run._run_on_files", lambda options, call: calls.append((options, call)))
    mrefali.ali2d("s.hdf", "out")
    assert cli.main(["ali2d", "s.hdf", "out"]) == 0
    assert cli.sxali2d(["s.hdf", "out"]) == 0
    assert calls[0] == calls[1] == calls[2]
    options, call = calls[0]
    assert (options.xr, options.yr, options.ts) == ((4, 2, 1, 1), (4, 2, 1, 1), (2, 1, 0.5, 0.25))
    assert (options.center, options.maxit, options.ou, call["rand_seed"]) == (-1, 0, -1, 1000)


@pytest.mark.jit_only
def test_blocks_and_threads_change_no_bit(tmp_path, monkeypatch):
    for name, threads, block in (("one", 1, 1 << 20), ("two", min(2, len(os.sched_getaffinity(0))), 7)):
        monkeypatch.setattr("mrefali.memory.BLOCK_BYTES", block * 4 * small.BOX**2)
        mrefali.ali2d(*write(tmp_path / name), threads=threads, **OPTIONS)
    same_files(tmp_path / "one", tmp_path / "two")


@pytest.mark.jit_only
@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs pip install 'mrefali[mpi]'")
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_change_no_bit(tmp_path, ranks):
    done = launch_python("-m", "mrefali", "ali2d", *write(tmp_path / "mpi", identity_poses(small.N_PARTICLES)), *WORDS,
                         "--MPI", "--threads=1", ranks=ranks)
    assert done.returncode == 0, done.stderr
    mrefali.ali2d(*write(tmp_path / "serial", identity_poses(small.N_PARTICLES)), **OPTIONS)
    same_files(tmp_path / "mpi", tmp_path / "serial")


@pytest.mark.jit_only
@pytest.mark.parametrize("saving", [[], ["--save_every=1"]], ids=["at-the-end", "headers-saved"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_run_that_was_ended_goes_on_to_the_same_bits(tmp_path, number, saving):
    """Though the headers that its first average was made of may have changed since."""
    for name in ("whole", "ended"):
        write(tmp_path / name, identity_poses(small.N_PARTICLES))
    words = {name: ["ali2d", str(tmp_path / name / "stack.hdf"), str(tmp_path / name / "out"), *WORDS, *saving]
             for name in ("whole", "ended")}
    assert cli.main(words["whole"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        end_within(patch, "before", refine, "_search_and_sum", number)
        with pytest.raises(Crash):
            cli.main(words["ended"])
    assert cli.main([*words["ended"], "--resume"]) == 0
    assert_same(tmp_path / "ended", tmp_path / "whole")


def test_another_seed_is_not_gone_on_with(tmp_path, capsys):
    stack, out = write(tmp_path / "run")
    assert cli.main(["ali2d", stack, out, *WORDS]) == 0
    capsys.readouterr()
    assert cli.main(["ali2d", stack, out, *WORDS, "--rand_seed=5", "--resume"]) == 2
    assert "rand_seed=5 (was 1000)" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    ({"rand_seed": -1}, "rand_seed=-1 is not allowed: give a whole number of at least 0"),
    ({"xr": (2, 1, 1)}, "ts=1 0.5 has 2 stages, but xr, yr and ts together 3"),
    ({"yr": -2}, "yr=-2.0 is not allowed: give the half-range"),
    ({"center": 7}, "center=7 is not allowed"),
])
def test_what_cannot_be_is_refused_and_nothing_made(tmp_path, options, message):
    stack, out = write(tmp_path / "run")
    before = small.snapshot(tmp_path)
    with pytest.raises(InputError, match=message):
        mrefali.ali2d(stack, out, **(OPTIONS | options))
    assert small.snapshot(tmp_path) == before


def test_three_particles_are_too_few(tmp_path):
    stack, out = str(tmp_path / "three.hdf"), tmp_path / "out"
    write_stack(stack, small.particles()[:3], [{"xform.align2d": m} for m in to_matrices(identity_poses(3))])
    with pytest.raises(InputError, match="three.hdf: 3 particles are too few for an average: give at least 4"):
        mrefali.ali2d(stack, str(out), **OPTIONS)
    assert not out.exists()
