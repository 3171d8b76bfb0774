"""One update of the classes: who replaces a class that vanished, whom centring moves, and functions that fail."""

import random

import naive
import numpy as np
import pytest
import small
from test_refine import ArrayStack, make_settings, run

import mrefali
from mrefali import average, classes, cli, health
from mrefali.average import ClassSums
from mrefali.classes import update_classes
from mrefali.geometry import compose, disc, identity_poses, make_poses
from mrefali.io import open_stack, write_stack
from mrefali.parallel import SERIAL
from mrefali.particles import Particles
from mrefali.search import Alignments
from mrefali.simulation import simulate

BOX = small.BOX


# --- members, averages and what a reference function is given


def sums_of(images, assign, n_classes):
    sums = ClassSums(n_classes, BOX, len(images), 10.0)
    sums.add(images, identity_poses(len(images)), assign, np.arange(len(images)))
    return sums


def references(n_classes):
    """References that can be told from one another, (n_classes, BOX, BOX) float32."""
    return np.random.default_rng(1).normal(size=(n_classes, BOX, BOX)).astype(np.float32)


def update(images, assign, n_classes, settings, poses=None, peak=None, rng=None):
    """The update of classes whose members, poses and peaks are given."""
    n = len(images)
    found = Alignments(assign, identity_poses(n) if poses is None else poses, np.zeros(n) if peak is None else peak)
    return update_classes(sums_of(images, assign, n_classes), found, references(n_classes),
                          Particles(ArrayStack(images), settings.inside), settings, rng or random.Random(1), SERIAL)


@pytest.mark.parametrize(("count", "vanished"), [(0, True), (3, True), (4, False)])
def test_a_class_vanishes_below_four_particles_and_keeps_its_true_count(count, vanished):
    images = small.particles()
    assign = np.where(np.arange(len(images)) < count, 1, 0).astype(np.int32)
    updates = update(images, assign, 2, make_settings(images))
    assert (updates[1].vanished, updates[1].count) == (vanished, count)
    assert updates[1].members.size == (1 if vanished else count)


def test_members_are_sorted_indices():
    images = small.particles()
    assign = (np.arange(len(images)) * 7 % 2).astype(np.int32)
    updates = update(images, assign, 2, make_settings(images))
    assert [c.members.tolist() for c in updates] == [np.flatnonzero(assign == k).tolist() for k in (0, 1)]


def test_the_reference_function_gets_the_mean_of_the_members_and_the_frc_of_the_half_sums():
    images = small.particles()
    assign = (np.arange(len(images)) % 3 == 0).astype(np.int32)
    calls = []

    def keep(mask, center, mean, frc):
        calls.append((center, mean, frc))
        return mean, np.zeros(2)

    settings = make_settings(images, function=keep, center=1)
    updates = update(images, assign, 2, settings)
    exact = images.astype(float)
    for k, (center, mean, frc) in enumerate(calls):
        mine = assign == k
        even = np.arange(len(images)) % 2 == 0
        np.testing.assert_allclose(mean, exact[mine].mean(axis=0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(frc, naive.frc(exact[mine & even].sum(axis=0), exact[mine & ~even].sum(axis=0)),
                                   rtol=0, atol=1e-9)
        assert center == 1
    assert len(calls) == 2
    assert [c.filter for c in updates] == [None, None]  # the function names none


def test_center_minus_1_passes_the_mean_shift_with_sx_of_mirrored_members_negated():
    images, n = small.particles(), small.N_PARTICLES
    poses = make_poses(0.0, np.where(np.arange(n) % 4 == 0, 2.0, -1.0), 0.5, (np.arange(n) % 4 == 0).astype(int))
    centres = []

    def keep(mask, center, mean, frc):
        centres.append(center)
        return mean, np.zeros(2)

    assign = np.zeros(n, np.int32)
    update(images, assign, 1, make_settings(images, center=-1, function=keep), poses)
    assert centres[0].tolist() == [-1.25, 0.5]  # a quarter of -2, three quarters of -1


# --- what replaces a class that vanished


class NoDraw:
    """A generator that must not be asked."""


def plain(mask, center, mean, frc):
    """A reference function that leaves the average as it is."""
    return mean, np.zeros(2)


def vanish(policy, sizes, peak=None, rng=None):
    """The update of classes of these sizes of the small particles, filled in the order of the stack."""
    images = small.particles()[:sum(sizes)]
    assign = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    return images, update(images, assign, len(sizes), make_settings(images, vanished=policy, function=plain),
                          peak=peak, rng=rng)


def test_keep_leaves_the_class_its_reference_and_members():
    _, updates = vanish("keep", [20, 0, 3], rng=NoDraw())
    for k, members in ((1, []), (2, [20, 21, 22])):
        np.testing.assert_array_equal(updates[k].image, references(3)[k])
        assert (updates[k].vanished, updates[k].count, updates[k].members.tolist()) == (True, len(members), members)


def half_of(images, indices):
    """The average of these particles, normalised."""
    chosen = images[indices]
    average.normalize_particles(chosen, disc(BOX, 6))
    return chosen.astype(float).mean(axis=0)


def test_split_takes_the_half_of_the_largest_class_that_fits_worse():
    """The class itself keeps the average and all the members it has; only the reference is shared out."""
    peak = np.random.default_rng(2).permutation(24).astype(float)
    images, updates = vanish("split", [5, 0, 19], peak, NoDraw())
    worse = 5 + np.argsort(peak[5:])[:9]  # of 19 the smaller half
    np.testing.assert_allclose(updates[1].image, half_of(images, np.sort(worse)), rtol=0, atol=1e-6)
    assert (updates[1].vanished, updates[1].count, updates[1].members.tolist()) == (True, 0, [])
    assert updates[2].members.tolist() == list(range(5, 24))
    assert not updates[2].vanished


def test_split_goes_on_with_the_better_half_and_then_with_the_next_largest_class():
    peak = np.arange(24, 0, -1).astype(float)  # the later, the worse
    images, updates = vanish("split", [16, 0, 0, 8, 0], peak)
    for k, indices in ((1, range(8, 16)), (2, range(4, 8)), (4, range(20, 24))):
        np.testing.assert_allclose(updates[k].image, half_of(images, list(indices)), rtol=0, atol=1e-6)


def test_split_of_equal_peaks_goes_by_index():
    images, updates = vanish("split", [0, 12])
    np.testing.assert_allclose(updates[0].image, half_of(images, list(range(6, 12))), rtol=0, atol=1e-6)


def test_split_keeps_the_reference_where_no_half_would_be_a_class():
    _, updates = vanish("split", [7, 2])
    np.testing.assert_array_equal(updates[1].image, references(2)[1])
    assert (updates[1].count, updates[1].members.tolist()) == (2, [7, 8])


def test_reseed_takes_those_that_fit_worst_of_the_class_that_has_most_of_them():
    """Of 24 particles of four classes half are looked at; class 3 has eight of those with low peaks, class 0 four."""
    peak = np.ones(24)
    peak[[0, 1, 2, 3]] = 0.1
    peak[[13, 14, 16, 17, 19, 20, 22, 23]] = 0.5
    images, updates = vanish("reseed", [12, 0, 0, 12], peak, NoDraw())
    np.testing.assert_allclose(updates[1].image, half_of(images, [13, 14, 16, 17, 19, 20, 22, 23]), rtol=0, atol=1e-6)
    assert (updates[1].vanished, updates[1].count, updates[1].members.tolist()) == (True, 0, [])
    assert updates[3].members.tolist() == list(range(12, 24))
    # what is left: of the lowest twelve these four are in class 0, and so are the first eight of equal peaks
    np.testing.assert_allclose(updates[2].image, half_of(images, list(range(12))), rtol=0, atol=1e-6)


def test_reseed_of_two_classes_takes_the_worse_half_of_the_other():
    peak = np.arange(20, dtype=float)
    images, updates = vanish("reseed", [20, 0], peak)
    np.testing.assert_allclose(updates[1].image, half_of(images, list(range(10))), rtol=0, atol=1e-6)


def test_reseed_keeps_the_reference_where_too_few_are_left():
    _, updates = vanish("reseed", [6, 0])
    np.testing.assert_array_equal(updates[1].image, references(2)[1])


@pytest.mark.parametrize("policy", ["split", "keep", "reseed"])
def test_the_same_call_finds_the_same(policy):
    images, views = small.particles(), np.stack([*small.references(), -small.references()[0]])
    settings = make_settings(images, vanished=policy, maxit=3)
    first, second = (run(images, views, small.poses(), settings) for _ in range(2))
    assert first[0].classes[2].vanished
    for one, other in zip(first, second, strict=True):
        assert one.averages.tobytes() == other.averages.tobytes()
        assert one.poses.tobytes() == other.poses.tobytes()


@pytest.mark.parametrize("policy", ["split", "keep", "reseed"])
def test_the_averages_file_says_that_nobody_is_in_a_class(tmp_path, policy):
    stack, refs = small.write(tmp_path)
    write_stack(refs, np.stack([*small.references(), -small.references()[0]]))
    out = tmp_path / "out"
    mrefali.mref_ali2d(stack, refs, str(out), maxit=1, vanished=policy, **small.OPTIONS)
    averages = open_stack(out / "aqm000.hdf")
    assert averages.column("ave_n")[2] == 0
    assert "members" not in averages.header(2)
    assert averages.read(2, 3).any()
    assert not (out / "drm0000002.txt").exists()
    assert "class 2: vanished with 0 particles\n" in (out / "mrefali.log").read_text()
    assert ("class 2: takes the " in (out / "mrefali.log").read_text()) is (policy != "keep")


# --- what the averages say of their classes


def copies(n_copies):
    """Particles of view 0 of the small job without any motion, in a tenth of its noise."""
    rng = np.random.default_rng(3)
    return (small.references()[:1] + 0.1 * rng.standard_normal((n_copies, BOX, BOX))).astype(np.float32)


def test_the_class_that_is_most_alike_is_counted_among_all_though_some_vanished():
    """Classes 1 and 4 are one view, 2 another; 0 and 3 have no particles."""
    other = np.rot90(small.references()[1])[None] + 0.1 * np.random.default_rng(4).standard_normal((12, BOX, BOX))
    images = np.concatenate([copies(24), other]).astype(np.float32)
    assign = np.repeat([1, 4, 2], 12).astype(np.int32)
    updates = update(images, assign, 5, make_settings(images, vanished="keep"))
    assert [c.like for c in updates][::3] == [None, None]
    assert [updates[1].like, updates[4].like] == [4, 1]
    assert updates[2].like in (1, 4)
    assert updates[1].likeness > 0.9 > updates[2].likeness
    assert np.isnan([updates[0].likeness, updates[0].detail, updates[0].detail_error]).all()


def test_what_the_averages_say_changes_nothing_else(monkeypatch):
    images = small.particles()
    assign = (np.arange(len(images)) % 2).astype(np.int32)
    with_health = update(images, assign, 2, make_settings(images))
    monkeypatch.setattr(classes, "_examine", lambda tallies, *others: [()] * len(tallies))
    for a, b in zip(with_health, update(images, assign, 2, make_settings(images)), strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.frc, b.frc)
        assert a.shift.tolist() == b.shift.tolist()
        assert (b.like, np.isnan(b.likeness)) == (None, True)


def test_halves_are_means_of_their_particles_however_many_they_are():
    """Detail is a power: a class with twice the particles has no more of it."""
    images = copies(36)
    assign = np.repeat([0, 1], [12, 24]).astype(np.int32)
    few, many = update(images, assign, 2, make_settings(images))
    assert few.detail == pytest.approx(many.detail, rel=0.05)


@pytest.mark.jit_only
def test_the_wiener_term_makes_no_junk_of_a_small_class(tmp_path):
    """Four views of noise that calls for a strong term, the last of them with 16 particles of 316."""
    simulate(tmp_path / "stack.hdf", 316, 4, 32, 0.5, 1.0, sizes=(100, 100, 100, 16), seed=1, CTF=True)
    stack, refs, out = (str(tmp_path / name) for name in ("stack.hdf", "stack_views.hdf", "out"))
    mrefali.mref_ali2d(stack, refs, out, ou=13, xrng=1, yrng=1, maxit=1, CTF=True, snr=0.05)
    last = small.read_table(tmp_path / "out/history.csv")
    assert last["count"][3] < 20
    assert last["detail"][3] + 2 * last["detail_error"][3] > health.JUNK_DETAIL
    assert last["detail"] == pytest.approx([1.0] * 4, abs=0.5)


# --- whom centring moves


@pytest.mark.parametrize("center", [1, -1, 2, 3])
def test_what_centres_an_average_is_folded_into_the_poses_of_its_members(center):
    images, views, poses = small.particles(), small.references(), small.poses()
    found, = run(images, views, poses, make_settings(images, center=0, maxit=1))
    centred, = run(images, views, poses, make_settings(images, center=center, maxit=1))
    shifts = np.array([c.shift for c in centred.classes])
    assert (np.abs(shifts).max(axis=1) > 0.01).all()
    expected = compose(found.poses, make_poses(0.0, *shifts[found.assign].T))
    assert centred.poses.tolist() == expected.tolist()


def off_centre(x, y):
    """A reference function by which the centre of each average lies there, unless it is told not to centre."""
    def function(mask, center, mean, frc):
        shift = np.zeros(2) if np.isscalar(center) and center == 0 else -np.array([x, y])
        return mean + shift[0], shift  # a picture that tells whether it was moved
    return function


@pytest.mark.parametrize(("limit", "moved"), [(None, True), (2.51, True), (2.49, False)])
def test_an_average_whose_centre_lies_beyond_center_limit_stays_where_it_is(limit, moved):
    """As far as the limit is measured straight, not along the axes."""
    images = small.particles()
    assign = np.zeros(len(images), np.int32)
    settings = make_settings(images, function=off_centre(2, 1.5), center_limit=limit)
    (found,) = update(images, assign, 1, settings)
    assert found.shift.tolist() == ([-2, -1.5] if moved else [0, 0])
    mean = images.astype(float).mean(axis=0)
    np.testing.assert_allclose(found.image, mean - 2 * moved, rtol=0, atol=1e-6)


def test_center_limit_counts_for_each_class_by_itself(tmp_path):
    files = *small.write(tmp_path), str(tmp_path / "out")
    options = small.OPTIONS | {"center": 1}
    mrefali.mref_ali2d(*files, maxit=1, **options)
    history = small.read_table(tmp_path / "out/history.csv")
    far = np.hypot(history["center_x"], history["center_y"])
    limit = far.mean()
    assert far.min() < limit < far.max()
    again = tmp_path / "again"
    again.mkdir()
    mrefali.mref_ali2d(*small.write(again), str(again / "out"), maxit=1, center_limit=limit, **options)
    limited = small.read_table(again / "out/history.csv")
    for k in range(2):
        centre = [limited["center_x"][k], limited["center_y"][k]]
        assert centre == ([0, 0] if far[k] > limit else [history["center_x"][k], history["center_y"][k]])
    log = (again / "out/mrefali.log").read_text()
    assert log.count("the average stays where it is") == 1
    assert f"class {np.argmax(far)}: its centre x " in log


# --- at the command line


OWN = """
import numpy as np

def away(mask, center, average, frc):
    return average, np.zeros(2) if np.isscalar(center) and center == 0 else np.array([0, -{place}])

def fails(mask, center, average, frc):
    return average[1], {{}}["key"]
"""


def align(folder, place, *words, name="away"):
    """Exit status of one iteration of the small job with a function whose centres lie at (0, place)."""
    (folder / "own.py").write_text(OWN.format(place=place))
    return cli.main(["mref_ali2d", *small.write(folder), str(folder / "out"), "--ou=6", "--center=1", "--maxit=1",
                     f"--function={folder / 'own.py'}:{name}", *words])


def test_centres_beyond_a_quarter_of_the_radius_are_warned_of(tmp_path, capsys):
    assert align(tmp_path, 1.6) == 0
    warning = ("iteration 0: the centres of classes 0, 1 lie beyond a quarter of the radius (farthest 1.6 px), which a "
               "centring that fails looks like; center_limit leaves such an average where it is\n")
    assert capsys.readouterr().err == f"mrefali: warning: {warning}"
    assert warning in (tmp_path / "out/mrefali.log").read_text()


@pytest.mark.parametrize(("place", "words"), [(1.4, []), (1.6, ["--center_limit=1.5"])])
def test_other_centres_are_not_warned_of(tmp_path, capsys, place, words):
    assert align(tmp_path, place, *words) == 0
    assert capsys.readouterr().err == ""


# --- functions that fail


def returning(*result):
    def own_function(mask, center, mean, frc):
        return result
    return own_function


def raising(mask, center, mean, frc):
    raise ZeroDivisionError("no ring is left")


def spoiled(value):
    image = np.ones((BOX, BOX))
    image[3, 4] = value
    return image


@pytest.mark.parametrize(("function", "message"), [
    (raising, "reference function raising failed for class 1: ZeroDivisionError: no ring is left"),
    (returning(np.ones((BOX, BOX))), "own_function failed for class 1: ValueError: not enough values"),
    (returning(np.ones((BOX, BOX - 1)), (0, 0)), r"reference function own_function returned for class 1 a reference of "
     r"shape \(20, 19\) and a shift of shape \(2,\): it must return \(20, 20\) and \(2,\)"),
    (returning(np.ones((BOX, BOX)), (0, 0, 0)), r"class 1 a reference of shape \(20, 20\) and a shift of shape \(3,\)"),
    (returning(spoiled(np.nan), (0, 0)), "own_function returned NaN or infinite numbers for class 1"),
    (returning(spoiled(np.inf), (0, 0)), "own_function returned NaN or infinite numbers for class 1"),
    (returning(np.ones((BOX, BOX)), (0, np.nan)), "returned NaN or infinite numbers for class 1"),
    (returning(np.ones((BOX, BOX)), (0, 0), 0.25), "returned for class 1 as its filter 0.25: it must return"),
])
def test_a_function_that_fails_stops_the_run_with_its_name_and_the_class(function, message):
    images = small.particles()
    with pytest.raises(RuntimeError, match=message):
        update(images, np.ones(len(images), np.int32), 2, make_settings(images, function=function, vanished="keep"))


def test_a_function_that_fails_for_a_split_names_the_class_it_is_for():
    images, calls = small.particles(), []

    def second_fails(mask, center, mean, frc):
        calls.append(mean)
        return mean if len(calls) == 1 else mean * np.nan, np.zeros(2)

    with pytest.raises(RuntimeError, match="second_fails returned NaN or infinite numbers for class 1"):
        update(images, np.zeros(len(images), np.int32), 2,
               make_settings(images, function=second_fails, vanished="split"))


def test_a_function_that_fails_leaves_the_headers_as_they_were(tmp_path):
    stack = small.write(tmp_path)[0]
    before = open_stack(stack).column("xform.align2d")
    with pytest.raises(RuntimeError, match=r"reference function .*own\.py:fails failed for class 0: KeyError: 'key'"):
        align(tmp_path, 0, name="fails")
    np.testing.assert_array_equal(open_stack(stack).column("xform.align2d"), before)
    assert "assign" not in open_stack(stack).header_names()
