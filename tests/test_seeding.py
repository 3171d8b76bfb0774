"""Classes of unaligned particles: the parts by themselves, then whole against known truth."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from class_particles import BOX, RADIUS, particles

from mrefali.average import transform
from mrefali.contrast import Contrast
from mrefali.geometry import compose, inverse_shift, invert, make_poses
from mrefali.likelihood import Likeliest
from mrefali.search import start_centres
from mrefali.seeding import (
    FIRST_ITERATIONS,
    MOST_ITERATIONS,
    Classes,
    State,
    _near_search,
    _needed,
    _settle,
    _split,
    _starts,
    _with_newcomers,
    _worth,
    find_seeds,
    search_of,
)
from mrefali.structure import SMALLEST_PART, Structures


def settled(images, made, assign, n_classes, half_range=1, most=MOST_ITERATIONS):
    """State from averages of classes given by ``assign``, and the rest of what says which are needed."""
    moved, search = transform(images, made.poses), search_of(BOX, RADIUS, half_range)[0]
    contrast = Contrast(images, RADIUS)
    averages = np.stack([moved[assign == k].mean(axis=0) for k in range(n_classes)])
    state = _settle(images, Classes(averages, np.bincount(assign), assign), contrast, search, most)
    structures = Structures(images, contrast, search, np.random.default_rng(1))
    return state, contrast, search, structures


def test_a_class_is_worth_what_its_members_fit_the_second_best_less():
    scores = np.array([[5.0, 4, 1], [7, 1, 3], [2, 9, 8.5], [1, 2, 2]])
    np.testing.assert_allclose(_worth(scores), [1 + 4, 0.5 + 0, 0])


@pytest.mark.jit_only
def test_it_is_asked_once_how_particles_fit_two_averages_until_one_gets_more(monkeypatch):
    images, made = particles(n=120, views=3)
    halves = 2 * made.classes + np.arange(120) % 2
    state, *_, structures = settled(images, made, halves, 6, most=1)
    asked, tell = [], structures.told_by_fit
    monkeypatch.setattr(structures, "told_by_fit", lambda groups, *rest: (asked.append(groups), tell(groups, *rest))[1])
    assert len(_needed(state, 6, structures)) == 3
    assert len(asked) > 3
    pairs = [frozenset(group.tobytes() for group in groups) for groups in asked]
    assert len(set(pairs)) == len(pairs)
    assert min(len(group) for groups in asked[-2:] for group in groups) > 30  # halves, of 20, have become wholes


@pytest.mark.jit_only
@pytest.mark.parametrize("seed", range(3))
def test_of_two_classes_of_one_view_one_can_be_done_without(seed):
    images, made = particles(n=120, views=2, snr=0.3, seed=seed)
    assign = made.classes.copy()
    assign[np.flatnonzero(assign == 0)[::2]] = 2
    state, _, _, structures = settled(images, made, assign, 3)
    assert sorted(_needed(state, 3, structures)) in ([0, 1], [1, 2])


@pytest.mark.jit_only
@pytest.mark.parametrize("seed", [2, 3])  # the two views of seeds 0 and 1 are alike
def test_a_small_class_that_is_told_apart_is_needed(seed):
    images, made = particles(n=150, views=2, snr=0.5, sizes=[9, 1], seed=seed)
    state, _, _, structures = settled(images, made, made.classes, 2)
    assert sorted(_needed(state, 2, structures)) == [0, 1]


@pytest.mark.jit_only
def test_a_twentieth_of_the_particles_is_told_from_the_rest_whatever_was_asked_before():
    images, made = particles(n=315, views=2, sizes=[20, 1])
    state, _, _, structures = settled(images, made, made.classes, 2)
    members = np.flatnonzero(state.assign == 0)
    structures.of(members, len(members), state.averages[0], state.counts[0])
    assert sorted(_needed(state, 2, structures)) == [0, 1]


@pytest.mark.jit_only
@pytest.mark.parametrize(("snr", "max_shift"), [(0.3, 4.0), (0.5, 3.0)])
def test_particles_beyond_the_search_are_no_class_of_their_own(snr, max_shift):
    for seed in range(2):
        images, _ = particles(n=200, views=1, snr=snr, max_shift=max_shift, seed=seed)
        assert find_seeds(images, 4, search_of(BOX, RADIUS, 2)[0], np.random.default_rng(1)).n_classes == 1


@pytest.mark.jit_only
def test_an_empty_class_is_not_kept_although_particles_of_others_would_fit_it():
    images, made = particles(n=90, views=2)
    assign = made.classes.copy()
    assign[np.flatnonzero(assign == 0)[:3]] = 2  # fewer than SMALLEST_PART: dropped
    state, _, _, structures = settled(images, made, assign, 3)
    counts = np.bincount(assign, minlength=4)
    scores = np.concatenate([state.scores, state.scores[:, :1] + 1], axis=1)  # like the first class, and better
    averages = np.concatenate([state.averages, state.averages[:1]])
    with_empty = State(averages, counts, assign.astype(np.int32), state.poses, scores)
    assert sorted(_needed(with_empty, 4, structures)) == [0, 1]


@pytest.mark.jit_only
def test_no_more_classes_are_kept_than_asked_for():
    images, made = particles(n=150, snr=1.0)
    state, _, _, structures = settled(images, made, made.classes, 3)
    assert [len(_needed(state, most, structures)) for most in (1, 2, 3, 4)] == [1, 2, 3, 3]


@pytest.mark.jit_only
def test_a_class_that_hardly_a_particle_belongs_to_is_dropped():
    images, made = particles(n=120, views=2)
    state, _, _, structures = settled(images, made, made.classes, 2)
    assign = state.assign.copy()
    assign[np.flatnonzero(assign == 0)[:3]] = 2
    few = replace(state, averages=np.concatenate([state.averages, state.averages[:2]]), counts=np.array([57, 60, 3, 0]),
                  assign=assign, scores=np.concatenate([state.scores, state.scores - 1], axis=1))
    np.testing.assert_array_equal(_needed(few, 4, structures), [0, 1])


@pytest.mark.jit_only
@pytest.mark.parametrize("seed", [2, 3])
def test_a_class_of_one_view_and_some_of_another_is_left_to_the_other(seed):
    # each would draw half of what both have in common
    images, made = particles(n=220, views=2, snr=0.3, sizes=[10, 1], seed=seed)
    assign = made.classes.copy()
    assign[np.flatnonzero(assign == 0)[::4]] = 1
    assert np.bincount(assign).tolist() == [150, 70]
    state, *_ = settled(images, made, assign, 2)
    counts = np.zeros((2, 2), int)
    np.add.at(counts, (state.assign, made.classes), 1)
    assert counts[1, 1] >= 18  # of 20
    assert counts[1, 0] <= 10  # of 200


@pytest.mark.parametrize(("half_range", "radius", "start"), [
    (3.0, 12, (1.5, -2.0)), (1.5, 12, (0.5, -0.5)), (0.5, 12, (0.0, 0.0)),
    (4.0, 12, (1.5, -2.0)), (6.0, 13, (1.0, -1.0)), (6.0, 14, (0.0, 0.0)),  # where the disc leaves 3, 2 and 1 px
])
def test_a_near_search_stays_within_the_range_and_the_disc_within_the_image(half_range, radius, start):
    # a particle whose centre was found at 1.5 px in x and -2.8 px in y, turned and mirrored
    poses = compose(invert(make_poses([0.0], 1.5, -2.8)), make_poses([30.0], 0.0, 0.0, 1))
    search = replace(search_of(BOX, radius, 1)[0], xr=half_range, yr=half_range)
    near = _near_search(search)
    assert near.xr == near.yr == min(1.0, half_range)
    starts = _starts(poses, search, near)
    np.testing.assert_allclose(inverse_shift(starts), [start], atol=1e-6)
    np.testing.assert_allclose(start_centres(starts, near), [start], atol=1e-6)  # and does not begin anew at 0, 0


@pytest.mark.jit_only
def test_wrong_classes_settle_by_near_searches_as_well(monkeypatch):
    images, made = particles(n=150, snr=0.5, max_shift=3.0)
    rng, labels = np.random.default_rng(0), made.classes.copy()
    wrong = rng.random(150) < 0.4
    labels[wrong] = rng.integers(0, 3, wrong.sum())
    searches, starts = [], []

    class Spy(Likeliest):
        def __init__(self, references, search):
            super().__init__(references, search)
            searches.append((search.xr, search.shift_step))

        def with_scores(self, images, poses, part_of):
            starts.append(inverse_shift(poses))
            return super().with_scores(images, poses, part_of)

    monkeypatch.setattr("mrefali.seeding.Likeliest", Spy)
    monkeypatch.setattr("mrefali.seeding.SETTLED", 0.0)
    state, *_ = settled(images, made, labels, 3, half_range=3, most=6)
    assert searches == [(3, 2), (3, 1), *[(1, 1)] * 4]
    assert not np.any(starts[:2])
    assert all(np.any(before != after) for before, after in pairwise(starts[1:]))  # each about the last
    assert (state.assign == made.classes).mean() > 0.95  # by whole searches 0.973
    apart = np.hypot(*(inverse_shift(state.poses) - inverse_shift(made.poses)).T)
    assert (apart < 1.0).mean() > 0.95  # by whole searches 0.993
    assert (np.abs(inverse_shift(made.poses)) > 1.0).any(axis=1).mean() > 0.5  # a near search from 0 would miss these


@pytest.mark.jit_only
def test_the_first_classes_are_aligned_a_few_times_only(monkeypatch):
    most = []

    def spy(images, classes, contrast, search, iterations=MOST_ITERATIONS):
        most.append((len(images), iterations))
        return _settle(images, classes, contrast, search, iterations)

    monkeypatch.setattr("mrefali.seeding._settle", spy)
    images, _ = particles(n=150)
    find_seeds(images, 5, search_of(BOX, RADIUS, 1)[0], np.random.default_rng(1))
    assert most[0] == (150, FIRST_ITERATIONS)
    assert {iterations for _, iterations in most[1:]} == {MOST_ITERATIONS}


@pytest.mark.jit_only
def test_an_empty_class_stays_empty():
    images, made = particles(n=90, views=2, snr=0.3)
    state, contrast, search, _ = settled(images, made, made.classes, 2)
    with_twin = Classes(np.concatenate([state.averages, state.averages[:1]]), np.append(state.counts, 0), state.assign)
    np.testing.assert_array_equal(_settle(images, with_twin, contrast, search).counts[2], 0)


@pytest.mark.jit_only
def test_a_class_of_two_views_is_cut_once():
    images, made = particles(n=80, views=2)
    state, contrast, search, structures = settled(images, made, np.zeros(80, int), 1)
    cut = []
    parts = _split(images, state, contrast, search, structures, cut)
    assert min(parts.counts) >= 35  # of 40
    np.testing.assert_array_equal(np.bincount(parts.assign), parts.counts)
    assert len(cut) == 1
    assert _split(images, state, contrast, search, structures, cut) is None


@pytest.mark.jit_only
def test_cutting_a_class_moves_no_particle_of_another_one():
    images, made = particles(n=120, views=3)
    state, contrast, search, structures = settled(images, made, np.minimum(made.classes, 1), 2)
    larger = state.counts.argmax()
    members, others = np.flatnonzero(state.assign == larger), np.flatnonzero(state.assign != larger)
    # with four others, which is nearly the same group
    structures.of(np.sort(np.append(members, others[:4])), 80, state.averages[larger], 80)
    parts = _split(images, state, contrast, search, structures, [])
    assert len(structures._known) == 2  # the one above, and that of the other class
    assert sorted(parts.counts)[1] >= 35  # of 40
    np.testing.assert_array_equal(np.bincount(parts.assign), parts.counts)


@pytest.mark.jit_only
def test_a_class_of_one_view_is_not_cut():
    images, made = particles(n=80, views=1, snr=0.3)
    state, contrast, search, structures = settled(images, made, np.zeros(80, int), 1)
    assert _split(images, state, contrast, search, structures, []) is None


def without_a_class(view, **options):
    """State of classes of all views but one, whose particles are in the first of the others, and the rest."""
    images, made = particles(**options)
    n_classes = made.classes.max()
    assign = np.array([*range(view), 0, *range(view, n_classes)])[made.classes]
    return images, made, *settled(images, made, assign, n_classes)


@pytest.mark.jit_only
@pytest.mark.parametrize("seed", range(3))
def test_the_neighbours_of_those_that_fit_worst_are_a_class_of_the_view_that_has_none(seed):
    images, made, state, contrast, search, _ = without_a_class(2, n=240, sizes=[8, 7, 1], seed=seed)
    came = np.zeros(240, bool)
    classes = _with_newcomers(images, state, 3, contrast, search, came)
    members = made.classes[classes.assign == 2]
    assert (members == 2).sum() > len(members) / 2  # of 12 neighbours
    np.testing.assert_array_equal(np.bincount(classes.assign), classes.counts)
    fit = state.scores.max(axis=1)
    assert came.sum() == 8  # for the one class that there is room for
    assert fit[came].max() <= fit[~came].min()
    counts = np.bincount(made.classes[_settle(images, classes, contrast, search).assign == 2], minlength=3)
    assert counts[2] >= 14  # of 15
    assert counts.sum() <= 17


@pytest.mark.jit_only
def test_newcomers_are_no_more_than_there_is_room_for_and_never_the_same():
    images, _, state, contrast, search, _ = without_a_class(2, n=60)
    came = np.zeros(60, bool)
    assert _with_newcomers(images, state, 2, contrast, search, came) is None
    assert not came.any()
    for n_classes, n_new, n_came in ((3, 1, 8), (5, 2, 24), (20, 5, 60)):
        classes = _with_newcomers(images, state, n_classes, contrast, search, came)
        assert len(classes.counts) == 2 + n_new
        assert came.sum() == n_came
    assert _with_newcomers(images, state, 20, contrast, search, came) is None


@pytest.mark.jit_only
@pytest.mark.parametrize(("seed", "sizes"), [(6, [1, 1, 1]), (21, [8, 7, 7, 1.2])])
def test_no_class_is_too_small_to_be_told(seed, sizes):
    images, _ = particles(n=300, views=len(sizes), sizes=sizes, snr=0.3, seed=seed)
    found = find_seeds(images, 8, search_of(BOX, RADIUS, 1)[0], np.random.default_rng(1))
    assert np.bincount(found.assign).min() >= SMALLEST_PART


@pytest.mark.jit_only
def test_a_small_class_is_found_among_the_particles_that_fit_worst(monkeypatch):
    images, made = particles(n=252, views=3, sizes=[12, 8, 1], snr=0.5, seed=5)

    def found():
        seeds = find_seeds(images, 3, search_of(BOX, RADIUS, 1)[0], np.random.default_rng(1))
        counts = np.zeros((seeds.n_classes, 3), int)
        np.add.at(counts, (seeds.assign, made.classes), 1)
        return counts

    np.testing.assert_array_equal(found() > 6, np.eye(3))  # each class is one view
    monkeypatch.setattr("mrefali.seeding._with_newcomers", lambda *_: None)
    assert len(found()) == 2


@pytest.mark.jit_only
def test_newcomers_that_are_no_class_of_their_own_leave_all_as_it_was(monkeypatch):
    before = []

    def spy(images, state, *others):
        before.append(state)
        return _with_newcomers(images, state, *others)

    monkeypatch.setattr("mrefali.seeding._with_newcomers", spy)
    images, _ = particles(n=150, seed=2)
    found = find_seeds(images, 5, search_of(BOX, RADIUS, 1)[0], np.random.default_rng(1))
    assert len(before) == 1
    order = np.argsort(-before[0].counts, kind="stable")
    np.testing.assert_array_equal(order[found.assign], before[0].assign)
    assert found.poses.tobytes() == before[0].poses.tobytes()


@pytest.mark.parametrize("box", [32, 64, 65, 200, 256])
def test_small_images_have_a_search_that_fits(box):
    search, factor = search_of(box, 10, 3.0)
    assert search.box == box // factor <= 96
    assert search.xr == 3.0 / factor
    assert search.outer_radius + search.xr <= search.box / 2 - 1


@pytest.mark.jit_only
def test_views_are_found_and_no_more():
    wrong = 0
    for seed in range(4):
        images, made = particles(n=150, seed=seed)
        found = find_seeds(images, 5, search_of(BOX, RADIUS, 1)[0], np.random.default_rng(1))
        counts = np.zeros((found.n_classes, 3), int)
        np.add.at(counts, (found.assign, made.classes), 1)
        assert found.n_classes == len(set(counts.argmax(axis=1))) == 3
        assert (np.diff(np.bincount(found.assign)) <= 0).all()
        wrong += 150 - counts.max(axis=1).sum()
    assert wrong < 0.02 * 4 * 150


@pytest.mark.jit_only
def test_a_small_class_beside_a_large_one_is_found():
    images, made = particles(n=200, views=2, sizes=[4, 1])
    found = find_seeds(images, 2, search_of(BOX, RADIUS, 1)[0], np.random.default_rng(1))
    counts = np.zeros((found.n_classes, 2), int)
    np.add.at(counts, (found.assign, made.classes), 1)
    assert counts[1, 1] >= 36  # of 40
    assert counts[1, 1] > counts[1, 0]


@pytest.mark.jit_only
def test_the_same_bits_whatever_the_number_of_threads(set_threads):
    images, _ = particles(n=60)
    found = []
    for n in (1, 2):
        set_threads(n)
        found.append(find_seeds(images, 5, search_of(BOX, RADIUS, 1)[0], np.random.default_rng(1)))
    np.testing.assert_array_equal(found[0].assign, found[1].assign)
    assert found[0].poses.tobytes() == found[1].poses.tobytes()
