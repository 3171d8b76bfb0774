"""Classes of limited size: the best of all assignments, on arrays and in a run; and ranks and resuming of any kind."""

import naive
import numpy as np
import pytest
import small
from conftest import JIT
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from test_mpi import MPIEXEC, launch, same_files
from test_refine import make_settings, run

import mrefali
from mrefali import assignment, cli
from mrefali.assignment import LIMITED, assign_within_limits, size_limits
from mrefali.errors import InputError
from mrefali.geometry import identity_poses
from mrefali.search import align, align_each, align_to, peaks_of_each, ring_spectra


def worth(scores, assign):
    """Sum of the scores, exact for those of the tests."""
    return scores[np.arange(len(scores)), assign].astype(float).sum()


def sizes(assign, n_classes):
    return np.bincount(assign, minlength=n_classes)


# --- arrays


@pytest.mark.parametrize(("kind", "n_particles", "n_classes", "limits"), [
    ("equal", 12, 3, (4, 4)), ("equal", 13, 3, (4, 5)), ("capped", 12, 4, (0, 9)), ("capped", 13, 4, (0, 10)),
    ("capped", 5, 1, (0, 15))])
def test_the_limits_of_the_sizes(kind, n_particles, n_classes, limits):
    assert size_limits(kind, n_particles, n_classes) == limits


@pytest.mark.parametrize("kind", LIMITED)
@given(n_particles=st.integers(1, 6), n_classes=st.integers(1, 5), levels=st.sampled_from([1, 3, 1000]),
       favourite=st.integers(0, 2), seed=st.integers(0, 2**16))
def test_no_assignment_of_allowed_sizes_is_worth_more(kind, n_particles, n_classes, levels, favourite, seed):
    """Held against all that there are; few levels make many ties, a favourite class one that all prefer."""
    scores = np.random.default_rng(seed).integers(-levels, levels + 1, (n_particles, n_classes)).astype(np.float32)
    scores[:, 0] += favourite * levels
    found = assign_within_limits(scores, kind)
    fewest, most = size_limits(kind, n_particles, n_classes)
    assert fewest <= sizes(found, n_classes).min()
    assert sizes(found, n_classes).max() <= most
    assert worth(scores, found) == naive.best_worth(scores, fewest, most)


@pytest.mark.parametrize("kind", LIMITED)
@pytest.mark.parametrize("shortest", [1, 2, 8])
def test_as_good_as_the_assignment_of_particles_to_places(monkeypatch, kind, shortest):
    """A place for each particle that a class may have; those that must be filled are worth more than all scores."""
    monkeypatch.setattr(assignment, "SHORTEST_QUEUE", shortest)
    n_particles, n_classes = (203, 6) if JIT else (41, 5)
    scores = np.random.default_rng(3).standard_normal((n_particles, n_classes)).astype(np.float32)
    scores += [2, 1, 0, 0, 0.5, 0][:n_classes]
    fewest, most = size_limits(kind, n_particles, n_classes)
    classes = np.repeat(np.arange(n_classes), most)
    must = np.tile(np.arange(most) < fewest, n_classes)
    _, places = linear_sum_assignment(scores[:, classes] + 1e3 * n_particles * must, maximize=True)
    found = assign_within_limits(scores, kind)
    # each score is rounded by at most half of 2^-30 of 8, and the sums by much less
    assert worth(scores, found) == pytest.approx(worth(scores, classes[places]), abs=n_particles * 2**-27)
    assert (sizes(found, n_classes) >= fewest).all()
    assert (sizes(found, n_classes) <= most).all()


def test_particles_stay_in_their_best_class_while_it_has_room():
    scores = np.random.default_rng(5).random((40, 4)).astype(np.float32)
    best = scores.argmax(axis=1)
    assert sizes(best, 4).max() <= size_limits("capped", 40, 4)[1]
    assert assign_within_limits(scores, "capped").tolist() == best.tolist()


@pytest.mark.parametrize("kind", LIMITED)
def test_where_all_is_equal_sizes_are_as_asked_for(kind):
    found = assign_within_limits(np.ones((25, 4), np.float32), kind)
    expected = {"capped": [0, 0, 6, 19], "equal": [6, 6, 6, 7]}[kind]
    assert sorted(sizes(found, 4)) == expected


def test_the_sizes_and_not_the_height_of_scores_decide_who_goes():
    """A class that all prefer keeps those that lose most elsewhere, here the first half."""
    scores = np.zeros((8, 2), np.float32)
    scores[:, 0] = 100 + np.arange(8, 0, -1)
    assert assign_within_limits(scores, "equal").tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_scores_does_not_matter(scale):
    scores = np.random.default_rng(6).standard_normal((60, 3)).astype(np.float32)
    # multiplied exactly, or another rounding might decide
    power = np.float32(2.0 ** np.round(np.log2(scale)))
    assert assign_within_limits(power * scores, "equal").tolist() == assign_within_limits(scores, "equal").tolist()


def test_scores_are_not_written():
    scores = np.random.default_rng(7).random((30, 3)).astype(np.float32)
    before = scores.copy()
    assign_within_limits(scores, "equal")
    np.testing.assert_array_equal(scores, before)


# --- the search for it


@pytest.fixture(scope="module")
def searched():
    images = small.particles()
    settings = make_settings(images)
    spectra = ring_spectra(np.concatenate([small.references(), small.references()[:, ::-1]]), settings.search)
    return images, identity_poses(len(images)), spectra, settings.search


@pytest.mark.parametrize("at_once", [1, 9, 1 << 18])
def test_peaks_are_those_of_each_reference_by_itself(monkeypatch, searched, at_once):
    monkeypatch.setattr("mrefali.search.FOUND_AT_ONCE", at_once)
    peaks = peaks_of_each(*searched)
    assert (peaks.dtype, peaks.shape) == (np.float32, (small.N_PARTICLES, 4))
    np.testing.assert_array_equal(peaks, align_each(*searched).peak.T.astype(np.float32))


def test_against_a_given_reference_a_particle_finds_what_it_would_by_itself(searched):
    images, poses, spectra, search = searched
    each, assign = align_each(*searched), (np.arange(len(images)) % 3).astype(np.int32)  # nobody is of the last
    found = align_to(images, poses, assign, spectra, search)
    assert found.assign.tolist() == assign.tolist()
    chosen = assign, np.arange(len(images))
    np.testing.assert_array_equal(found.peak, each.peak[chosen])
    assert found.poses.tobytes() == each.poses[chosen].tobytes()
    best = align(images, poses, spectra, search)
    assert align_to(images, poses, best.assign, spectra, search).poses.tobytes() == best.poses.tobytes()


# --- runs


def aligned(kind, **options):
    return mrefali.align(small.particles(), small.references(), ou=6, xr=1, yr=1, maxit=2, quiet=True,
                         assignment=kind, **options)


def test_classes_of_a_run_are_equal_to_one_particle():
    found = aligned("equal", normalize_references=True)
    assert sizes(aligned("best").assign, 2).tolist() != [12, 12]
    for iteration in found.iterations:
        assert [c.count for c in iteration.classes] == [12, 12]


def test_a_class_that_all_prefer_is_capped():
    """One reference of ten times the contrast takes all, and the others vanish."""
    references = np.stack([10 * small.references()[0], *small.references(), small.references()[1, ::-1]])
    options = {"ou": 6, "xr": 1, "yr": 1, "maxit": 1, "quiet": True, "vanished": "keep"}
    best, capped = (mrefali.align(small.particles(), references, assignment=kind, **options)
                    for kind in ("best", "capped"))
    assert sizes(best.assign, 4).max() == small.N_PARTICLES
    assert sizes(capped.assign, 4).max() == 18


def test_a_cap_that_nobody_meets_changes_no_bit():
    best, capped = aligned("best", subpixel=True, lowpass=0.3), aligned("capped", subpixel=True, lowpass=0.3)
    for one, other in zip(best.iterations, capped.iterations, strict=True):
        assert one.averages.tobytes() == other.averages.tobytes()
        assert one.poses.tobytes() == other.poses.tobytes()
        assert one.peak.tobytes() == other.peak.tobytes()
        assert one.assign.tolist() == other.assign.tolist()


@pytest.mark.parametrize("block", [1, 7])
def test_blocks_do_not_matter(monkeypatch, block):
    images = small.particles()
    settings = make_settings(images, assignment="equal")
    expected = run(images, small.references(), small.poses(), settings)
    monkeypatch.setattr("test_refine.Particles", lambda stack, inside: _in_blocks(stack, inside, block))
    found = run(images, small.references(), small.poses(), settings)
    assert found[-1].averages.tobytes() == expected[-1].averages.tobytes()
    assert found[-1].poses.tobytes() == expected[-1].poses.tobytes()


def _in_blocks(stack, inside, block):
    from mrefali.particles import Particles
    return Particles(stack, inside, block_bytes=4 * stack.box**2 * block)


@pytest.mark.jit_only
@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs pip install 'mrefali[mpi]'")
@pytest.mark.parametrize(("ranks", "kind", "words"), [
    (2, "equal", ["--CTF", "--maxit=2"]),
    (3, "equal", ["--subpixel", "--normalize_references", "--lowpass=0.2", "--maxit=3"]),
    (2, "capped", ["--vanished=reseed", "--maxit=3"]), (3, "capped", ["--vanished=reseed", "--maxit=0"]),
    (2, "likeliest", ["--CTF", "--subpixel", "--maxit=3"]),
    (3, "likeliest", ["--vanished=reseed", "--lowpass=0.2", "--maxit=3"])])
def test_ranks_assign_as_one_process_does(tmp_path, ranks, kind, words):
    folders = tmp_path / "one", tmp_path / "many"
    one, many = ((*write(folder), str(folder / "out")) for folder in folders)
    words = [*small.WORDS, f"--assignment={kind}", *words]
    assert launch(*many, *words, "--MPI", "--threads=1", ranks=ranks).returncode == 0
    assert cli.main(["mref_ali2d", *one, *words]) == 0
    same_files(*folders)


def write(folder):
    """The small job with five references, of which one is stronger, so that all prefer it."""
    folder.mkdir()
    stack, refs = small.write(folder)
    views = small.references()
    mrefali.write_stack(refs, np.stack([10 * views[0], *views, *views[:, ::-1]]))
    return stack, refs


@pytest.mark.parametrize("kind", ["equal", "likeliest"])
def test_a_run_goes_on_as_if_it_had_never_ended(tmp_path, kind):
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    words = [*small.WORDS, f"--assignment={kind}", "--quiet"]
    for folder, maxits in ((whole, [3]), (ended, [1, 3])):
        files = [*write(folder), str(folder / "out")]
        for i, maxit in enumerate(maxits):
            assert cli.main(["mref_ali2d", *files, *words, f"--maxit={maxit}", *["--resume"] * i]) == 0
    same_files(whole, ended)


def test_a_run_does_not_go_on_with_another_assignment(tmp_path, capsys):
    files = [*write(tmp_path / "run"), str(tmp_path / "run" / "out")]
    assert cli.main(["mref_ali2d", *files, *small.WORDS, "--maxit=1", "--assignment=equal"]) == 0
    capsys.readouterr()
    assert cli.main(["mref_ali2d", *files, *small.WORDS, "--maxit=2", "--assignment=capped", "--resume"]) == 2
    assert "assignment=capped (was equal)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", LIMITED)
def test_fewer_particles_than_make_classes_are_refused(kind):
    references = np.random.default_rng(0).standard_normal((7, 20, 20))
    with pytest.raises(InputError, match=f"^images: 24 particles are too few for assignment={kind} to 7 classes of at "
                                         "least 4: give at most 6 references, or assignment=best$"):
        mrefali.align(small.particles(), references, assignment=kind)


@pytest.mark.parametrize("command", ["local_ali2d stack.hdf refs.hdf out", "ali2d stack.hdf out"])
def test_where_particles_have_no_choice_there_is_no_such_option(capsys, command):
    assert cli.main([*command.split(), "--assignment=equal"]) == 2
    assert "unknown option --assignment" in capsys.readouterr().err
