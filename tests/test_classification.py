"""``classify`` and ``seed``: raw particles in, classes out, however they are run; and references of one contrast."""

import os
import re

import h5py
import numpy as np
import pytest
from test_mpi import launch_python, same_files

import mrefali
from mrefali import cli, structure
from mrefali.accuracy import compare
from mrefali.classification import bytes_needed, n_drawn
from mrefali.errors import InputError, RunFailed
from mrefali.findings import findings
from mrefali.geometry import disc
from mrefali.io import open_stack, write_stack
from mrefali.seeding import PAIR_BYTES, Seeds, search_of
from mrefali.simulation import read_truth, simulate

BOX = 32


def write(folder, n=120, views=2, snr=1.0, **options):
    """A stack of simulated particles in ``folder``."""
    stack = folder / "p.hdf"
    simulate(stack, n, views, BOX, snr, 1.0, **options)
    return str(stack)


def shares(stack, n_classes, views):
    """Shares of the particles in the right class, and of those with the right mirror."""
    classes, poses = read_truth(stack.removesuffix(".hdf") + "_truth.csv")
    aligned = open_stack(stack)
    found = compare(aligned.column("assign"), aligned.poses(), classes, poses, n_classes, views)
    return found.class_share, found.mirror_share


@pytest.mark.jit_only
def test_raw_particles_become_classes(tmp_path, capsys):
    stack, out = write(tmp_path, n=180, views=3), str(tmp_path / "out")
    assert cli.main(["classify", stack, out, "--K=3"]) == 0
    assert min(shares(stack, 3, 3)) > 0.95
    run = mrefali.open_run(out)
    assert run.state == "finished"
    assert (run.counts[-1] > 40).all()
    assert "no more than 1% of the particles changed class" in capsys.readouterr().out
    assert run.parameters["xr"] == 2.0  # a twentieth of the box
    assert run.parameters["outer_radius"] == 13
    assert any(re.fullmatch("seeds: round 1: [0-9]+ classes", text) for *_, text in run.log)


@pytest.mark.jit_only
def test_fewer_classes_than_asked_for_are_said(tmp_path, capsys):
    stack, out = write(tmp_path), str(tmp_path / "out")
    assert cli.main(["classify", stack, out, "--K=6"]) == 0
    run = mrefali.open_run(out)
    assert run.n_references == 2
    assert "particles; no more could be told apart, of the 6 asked for\n" in capsys.readouterr().out
    assert "2 classes were found, K=6 asked for" in [title for title, _ in findings(run)]


@pytest.mark.jit_only
def test_classes_found_in_some_of_the_particles_get_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr("mrefali.classification.PARTICLES_A_CLASS", 30)
    monkeypatch.setattr("mrefali.classification.FEWEST_PARTICLES", 40)
    stack, out = write(tmp_path, n=240), str(tmp_path / "out")
    mrefali.classify(stack, out, K=2, quiet=True)
    run = mrefali.open_run(out)
    assert "seeds: in 60 particles of 32 x 32 px, 2 classes at most" in [text for *_, text in run.log]
    assert run.counts[-1].sum() == 240
    assert min(shares(stack, 2, 2)) > 0.95


def test_seeds_are_found_in_a_hundred_particles_a_class_and_in_two_thousand_at_least():
    assert [n_drawn(n, 8) for n in (500, 5000)] == [500, 2000]
    assert [n_drawn(n, 50) for n in (500, 50000)] == [500, 5000]


@pytest.mark.jit_only
def test_a_stack_without_poses_and_one_with_any_poses_give_the_same(tmp_path):
    averages = []
    for name in ("raw", "posed", "spoiled"):
        (tmp_path / name).mkdir()
        stack = write(tmp_path / name)
        if name == "raw":
            images = open_stack(stack).read(0, 120)
            stack = str(tmp_path / name / "raw.hdf")
            write_stack(stack, images, pixel_size_A=2.0)
        else:
            mrefali.header(stack, params="xform.align2d", randomize=True)
        if name == "spoiled":
            with h5py.File(stack, "r+") as file:
                attributes = file["MDF/images/7"].attrs
                matrix = attributes["EMAN.xform.align2d"]
                matrix[matrix.dtype.names[0]] = np.nan
                attributes.modify("EMAN.xform.align2d", matrix)
        mrefali.classify(stack, str(tmp_path / name / "out"), K=2, maxit=1, quiet=True)
        averages.append(open_stack(tmp_path / name / "out" / "multi_ref.hdf").read(0, 2))
    np.testing.assert_array_equal(averages[0], averages[1])
    np.testing.assert_array_equal(averages[0], averages[2])


@pytest.mark.jit_only
def test_two_ranks_find_what_one_finds(tmp_path):
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        os.rename(write(folder, n=60), folder / "stack.hdf")
        call = f"mrefali.classify({str(folder / 'stack.hdf')!r}, {str(folder / 'out')!r}, K=2, maxit=2, threads=1, "
        done = launch_python("-c", f"import mrefali; {call} quiet=True, MPI=True)", ranks=ranks)
        assert done.returncode == 0, done.stderr
    same_files(tmp_path / "1", tmp_path / "2")


@pytest.mark.jit_only
def test_resuming_gives_the_bits_of_a_run_that_went_on(tmp_path, monkeypatch):
    made = []
    for name, steps in (("whole", [3]), ("resumed", [1, 3])):
        (tmp_path / name).mkdir()
        stack, out = write(tmp_path / name), str(tmp_path / name / "out")
        for i, maxit in enumerate(steps):
            if i > 0:  # the references are those of the run
                monkeypatch.setattr("mrefali.classification.find_references", None)
            mrefali.classify(stack, out, K=2, maxit=maxit, quiet=True, resume=i > 0)
        averages = open_stack(out + "/multi_ref.hdf")
        made.append(averages.read(0, averages.n_images))
    np.testing.assert_array_equal(*made)


@pytest.mark.jit_only
def test_a_run_that_ended_before_its_first_iteration_goes_on_from_its_seeds(tmp_path, monkeypatch):
    """Which particles are in which reference counts in that iteration, and is known no more but from the checkpoint."""
    made = []
    for name in ("whole", "ended"):
        (tmp_path / name).mkdir()
        stack, out = write(tmp_path / name, n=60), str(tmp_path / name / "out")
        if name == "ended":
            with monkeypatch.context() as patch:
                patch.setattr("mrefali.run.refine", no_disk)
                with pytest.raises(RunFailed, match="0 of 1 iterations are finished"):
                    mrefali.classify(stack, out, K=2, maxit=1, quiet=True)
            for looks_for_seeds in ("find_references", "estimate_seconds"):
                monkeypatch.setattr(f"mrefali.classification.{looks_for_seeds}", None)
            mrefali.classify(stack, out, K=2, maxit=1, quiet=True, resume=True, check=True)
        mrefali.classify(stack, out, K=2, maxit=1, quiet=True, resume=name == "ended")
        made.append((tmp_path / name / "out" / "poses.csv").read_text())
    assert made[0] == made[1]


def no_disk(*arguments):
    raise OSError("the disk is gone")


@pytest.mark.jit_only
def test_seeds_are_references_that_mref_ali2d_takes(tmp_path):
    stack, refs = write(tmp_path, seed=1), str(tmp_path / "refs.hdf")  # the two views of seed 0 are alike
    assert cli.main(["seed", stack, refs, "--K=2", "--xr=1"]) == 0
    assert open_stack(refs).n_images == 2
    assert open_stack(refs).pixel_size_A == 2.0
    mrefali.mref_ali2d(stack, refs, str(tmp_path / "out"), ou=12, xrng=1, yrng=1, maxit=1, quiet=True)
    assert min(shares(stack, 2, 2)) > 0.95


@pytest.mark.parametrize(("words", "message"), [
    (["--K=0"], "K=0 is not allowed: give a number of classes of at least 1"),
    (["--K=31"], "120 particles are too few for K=31 classes: give at least 124"),
    (["--K=2", "--xr=-2", "--ou=10"], "xr=-2"),
    (["--K=2", "--rand_seed=-1"], "rand_seed=-1 is not allowed"),
])
def test_what_cannot_be_classified_is_refused(tmp_path, capsys, words, message):
    stack = write(tmp_path)
    for command, out in (("classify", "out"), ("seed", "refs.hdf")):
        assert cli.main([command, stack, str(tmp_path / out), *words]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / out).exists()


def test_seed_writes_over_nothing(tmp_path):
    stack = write(tmp_path)
    with pytest.raises(FileExistsError, match="p.hdf exists: give another name, or remove it first"):
        mrefali.seed(stack, stack, K=2)
    with pytest.raises(InputError, match="refs.mrcs is not allowed: give a file name that ends in .hdf"):
        mrefali.seed(stack, str(tmp_path / "refs.mrcs"), K=2)
    with pytest.raises(FileNotFoundError, match="refs.hdf cannot be made: there is no folder .*no, make it first"):
        mrefali.seed(stack, str(tmp_path / "no" / "refs.hdf"), K=2)


def test_checking_finds_no_seeds_and_makes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mrefali.classification.find_references", None)
    stack = write(tmp_path, n=20)
    assert cli.main(["classify", stack, str(tmp_path / "out"), "--K=2", "--check"]) == 0
    said = capsys.readouterr().out
    seeding = "estimate: [0-9].* to find the references, several times that with more views than K\n"
    assert re.search(seeding + ".*estimate: .* an iteration", said)
    assert not (tmp_path / "out").exists()


def test_the_memory_of_seeding_is_in_the_estimate(tmp_path, monkeypatch):
    stack = open_stack(write(tmp_path, n=24))
    search = search_of(BOX, 12, 1.0)[0]
    # twice the pixels of 24 particles, and of many two thousand, and what a group takes that may be all of them
    assert bytes_needed(24, 6, search) == 2 * 4 * 24 * BOX**2 + structure.bytes_needed(24, BOX)
    assert bytes_needed(10**6, 6, search) == 2 * 4 * 2000 * BOX**2 + structure.bytes_needed(2000, BOX)
    # or of pairs, where there are many classes: eight particles a class begin as references
    assert bytes_needed(10**6, 60, search) == 2 * 4 * 6000 * BOX**2 + 6000 * 480 * PAIR_BYTES
    monkeypatch.setattr("mrefali.classification.bytes_needed", lambda *numbers: 1 << 50)
    with pytest.raises(InputError, match="^max_memory=4096MB .* references for K=2 takes 1073.*; give more$"):
        mrefali.classify(stack.path, str(tmp_path / "out"), K=2, max_memory="4GB")
    monkeypatch.setattr("mrefali.classification.bytes_needed", lambda n, n_classes, search: n_classes << 50)
    with pytest.raises(InputError, match="give more, or a smaller K$"):
        mrefali.classify(stack.path, str(tmp_path / "out"), K=2, max_memory="4GB")


def test_no_seeds_are_looked_for_where_the_results_have_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr("mrefali.classification.find_references", None)
    monkeypatch.setattr("mrefali.run.bytes_needed", lambda *numbers: 1 << 60)
    with pytest.raises(InputError, match="out gets the results of 10 iterations, which takes"):
        mrefali.classify(write(tmp_path, n=20), str(tmp_path / "out"), K=2, quiet=True)


def test_references_of_one_contrast_share_the_particles(tmp_path):
    stack = write(tmp_path)
    images, views = open_stack(stack).read(0, 120), open_stack(tmp_path / "p_views.hdf").read(0, 2)
    classes, _ = read_truth(tmp_path / "p_truth.csv")
    inside = disc(BOX, 12)
    views -= views[:, inside].mean(axis=1)[:, None, None]
    views[1] *= 3 * views[0][inside].std() / views[1][inside].std()
    options = {"ou": 12, "xr": 1, "yr": 1, "maxit": 1, "quiet": True}
    plain = mrefali.align(images, views, **options)
    scaled = mrefali.align(images, views, normalize_references=True, **options)
    assert (plain.assign == 1).all()  # contrast wins
    assert (scaled.assign == classes).mean() > 0.95


def test_seeds_of_small_images_are_averages_at_full_size(tmp_path, capsys, monkeypatch):
    stack = tmp_path / "p.hdf"
    simulate(stack, 60, 2, 128, 1.0, 6.0)
    classes, poses = read_truth(tmp_path / "p_truth.csv")
    small = poses.copy()
    for name in ("sx", "sy"):
        small[name] /= 2
    boxes = []

    def find_seeds(images, n_classes, search, rng, report, ctf):
        assert ctf is None
        boxes.append((images.shape, search.box))
        return Seeds(classes.astype(np.int32), small, 2)

    monkeypatch.setattr("mrefali.classification.find_seeds", find_seeds)
    assert cli.main(["seed", str(stack), str(tmp_path / "refs.hdf"), "--K=2", "--xr=6", "--center=0"]) == 0
    assert "2 references in " in (said := capsys.readouterr().out)
    assert said.endswith("refs.hdf, found with ou=57 and xr=6\n")
    assert boxes == [((60, 64, 64), 64)]
    found, views = (open_stack(tmp_path / name).read(0, 2) for name in ("refs.hdf", "p_views.hdf"))
    inside = disc(128, 40)
    for k in range(2):  # of 30 particles each, low-passed; half the shift would leave 0.7 or so
        assert np.corrcoef(found[k][inside], views[k][inside])[0, 1] > 0.95


@pytest.mark.jit_only
def test_particles_of_a_star_with_a_ctf_are_classified_without_mirrors(tmp_path):
    stack, star = tmp_path / "p.hdf", str(tmp_path / "p.star")
    simulate(stack, 120, 2, 64, 1.0, 2.0, mirror=False, CTF=True)
    mrefali.convert(str(stack), star)
    mrefali.classify(star, str(tmp_path / "out"), K=2, CTF=True, mirror=False, quiet=True)
    run, (classes, _) = mrefali.open_run(str(tmp_path / "out")), read_truth(tmp_path / "p_truth.csv")
    assert not run.poses["mirror"].any()
    assign = run.poses["assign"].to_numpy()
    assert max((assign == classes).mean(), (assign != classes).mean()) > 0.95
    assert (tmp_path / "out" / "particles.star").exists()


@pytest.mark.jit_only
def test_what_fails_while_seeds_are_found_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mrefali.classification.find_seeds", no_disk)
    assert cli.main(["classify", write(tmp_path), str(tmp_path / "out"), "--K=2"]) == 2
    assert "the disk is gone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_search_that_leaves_no_disc_is_refused(tmp_path):
    with pytest.raises(InputError, match="xr=14 leaves a disc of 1 px in images of 32 px: give a smaller xr"):
        mrefali.classify(write(tmp_path), str(tmp_path / "out"), K=2, xr=14)


def test_k_must_be_a_number(tmp_path):
    with pytest.raises(InputError, match="K='two' is not allowed: give a whole number"):
        mrefali.classify(write(tmp_path), str(tmp_path / "out"), K="two")
