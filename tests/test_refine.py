"""The loop against its slow twin, and what becomes of vanished classes, blocks and auto-stop."""

import random
import threading
import time

import naive
import numpy as np
import pytest
import small
from conftest import JIT

from mrefali import average, reference, refine
from mrefali.geometry import disc, identity_poses
from mrefali.parallel import SERIAL
from mrefali.particles import Particles
from mrefali.search import Search, align, ring_spectra

BOX = small.BOX


class ArrayStack:
    """A stack in memory that gives out copies and counts what it is asked for."""

    def __init__(self, images):
        self.images, self.n_images, self.box, self.blocks = images, len(images), images.shape[1], []

    def read(self, start, stop):
        self.blocks.append((start, stop))
        return self.images[start:stop].copy()

    def read_at(self, indices):
        return self.images[indices].copy()


def largest_pixel(images, inside):
    return average.pixel_statistics(images, inside).largest


def make_settings(images, **changes):
    """Settings of the small job."""
    mask = changes.pop("mask", disc(BOX, 6).astype(np.float32))
    search = changes.pop("search", Search(BOX, 1, 6, 1, 1, 1, 1))
    return refine.Settings(**{
        "search": search, "mask": mask, "center": 1, "maxit": 2, "function": reference.ref_ali2d, "rand_seed": 1000,
        "largest": largest_pixel(images, mask != 0), "quiet": True} | changes)


def run(images, references, poses, settings):
    return list(refine.refine(Particles(ArrayStack(images), settings.inside), references, poses, settings, SERIAL))


def soft_mask():
    d = np.arange(BOX) - BOX // 2
    return np.clip((9 - np.hypot(d[:, None], d)) / 4, 0, 1).astype(np.float32)


# --- against the slow twin


@pytest.mark.parametrize("center", [0, 1, -1])
@pytest.mark.parametrize("soft", [False, True], ids=["disc", "soft mask"])
def test_every_iteration_is_that_of_the_slow_twin(center, soft):
    images, references, poses = small.particles(), small.references(), small.poses()
    mask = soft_mask() if soft else disc(BOX, 6).astype(np.float32)
    iterations = 3 if JIT else 2
    found = run(images, references, poses, make_settings(images, mask=mask, center=center, maxit=iterations))
    expected = naive.run(images, references, poses, mask, 1, 6, 1, 1, 1, 1, center, iterations)
    assert [iteration.number for iteration in found] == list(range(iterations))
    for mine, slow in zip(found, expected, strict=True):
        assert_same_iteration(mine, slow)
    assert any(c.shift.any() for c in found[0].classes) == (center != 0)


def assert_same_iteration(mine, slow):
    """One iteration; float32 references and the path of the simplex leave a little between the two."""
    assert mine.assign.tolist() == slow["assign"].tolist()
    assert mine.poses["mirror"].tolist() == slow["poses"]["mirror"].tolist()
    np.testing.assert_allclose((mine.poses["alpha"] - slow["poses"]["alpha"] + 180) % 360, 180, rtol=0, atol=0.02)
    for axis in ("sx", "sy"):
        np.testing.assert_allclose(mine.poses[axis], slow["poses"][axis], rtol=0, atol=0.005)
    np.testing.assert_allclose(mine.peak, slow["peak"], rtol=1e-4)
    assert mine.criterion == pytest.approx(slow["criterion"], rel=1e-4)
    for k, update in enumerate(mine.classes):
        assert update.members.tolist() == slow["members"][k].tolist()
        assert update.count == (slow["assign"] == k).sum()
        np.testing.assert_allclose(update.image, slow["averages"][k], rtol=0, atol=1e-3 * slow["averages"][k].std())
        assert update.vanished == (k not in slow["frc"])
        if not update.vanished:
            np.testing.assert_allclose(update.frc, slow["frc"][k], rtol=0, atol=1e-4)
            assert (update.filter.cutoff, update.filter.falloff) == pytest.approx(slow["filters"][k], abs=1e-3)
            np.testing.assert_allclose(update.shift, -slow["centers"][k], rtol=0, atol=1e-3)


# --- classes that vanish


@pytest.mark.parametrize("seed", [1000, 7])
def test_vanished_classes_are_replaced_by_the_particles_of_the_slow_twin(seed):
    images, poses = small.particles(), small.poses()
    # two references too faint to attract anything
    faint = 1e-3 * np.random.default_rng(0).normal(size=(2, BOX, BOX)).astype(np.float32)
    references = np.concatenate([faint[:1], small.references(), faint[1:]])
    mask = disc(BOX, 6).astype(np.float32)
    found = run(images, references, poses, make_settings(images, rand_seed=seed))
    expected = naive.run(images, references, poses, mask, 1, 6, 1, 1, 1, 1, 1, 2, seed)
    for mine, slow in zip(found, expected, strict=True):
        assert_same_iteration(mine, slow)

    rng, last = random.Random(seed), len(images) - 1
    drawn = [rng.randint(0, last), rng.randint(0, last)]  # one draw per vanished class, in order of class
    vanished = [found[0].classes[0], found[0].classes[3]]
    assert [c.vanished for c in found[0].classes] == [True, False, False, True]
    assert [c.members.tolist() for c in vanished] == [[i] for i in drawn]
    normalised = images.copy()
    average.normalize_particles(normalised, mask != 0)
    for update, i in zip(vanished, drawn, strict=True):
        np.testing.assert_array_equal(update.image, normalised[i])  # as it is: not moved, filtered or masked
        assert update.count == 0
        assert update.frc is update.filter is update.shift is None


# --- the loop


def scripted(factors):
    """A reference function whose averages have, one call after the other, these heights."""
    remaining = iter(factors)

    def function(mask, center, mean, frc):
        return np.full(mask.shape, next(remaining)) * mask, np.zeros(2)

    return function


def rotation_only(images, **changes):
    return make_settings(images, search=Search(BOX, 1, 6, 1, 0, 0, 1), **changes)


def heights(factors, maxit):
    """Heights of the averages that a run with one reference yields."""
    images = small.particles()[:6]
    settings = rotation_only(images, function=scripted(factors), maxit=maxit)
    return [float(i.averages.max()) for i in run(images, small.references()[:1], small.poses()[:6], settings)]


def test_auto_stop_keeps_the_iteration_in_which_the_criterion_fell_and_ends_there():
    assert heights([1, 2, 3, 1, 9], maxit=0) == [1, 2, 3, 1]


def test_auto_stop_goes_on_while_the_criterion_stays_equal():
    assert heights([2, 2, 2, 1, 9], maxit=0) == [2, 2, 2, 1]


def test_auto_stop_ends_after_ten_iterations_at_the_latest():
    assert len(heights(range(1, 20), maxit=0)) == 10


def test_a_given_number_of_iterations_is_run_though_the_criterion_falls():
    assert heights([3, 2, 1], maxit=3) == [3, 2, 1]


def test_the_criterion_is_that_of_the_new_averages():
    images = small.particles()
    settings = make_settings(images, maxit=1)
    iteration, = run(images, small.references(), small.poses(), settings)
    assert iteration.criterion == average.criterion(iteration.averages, settings.mask > 0.5)
    np.testing.assert_array_equal(iteration.averages, [c.image for c in iteration.classes])
    assert iteration.averages.dtype == np.float32


def test_all_particles_change_class_first_and_later_those_that_do():
    images = small.particles()
    first, second = run(images, small.references(), small.poses(), make_settings(images))
    assert first.changed.all()
    assert second.changed.tolist() == (first.assign != second.assign).tolist()


def test_inputs_are_not_written():
    images, references, poses = small.particles(), small.references(), small.poses()
    before = images.copy(), references.copy(), poses.copy()
    run(images, references, poses, make_settings(images))
    for now, then in zip((images, references, poses), before, strict=True):
        np.testing.assert_array_equal(now, then)


def assert_same_bits(mine, other):
    assert mine.assign.tobytes() == other.assign.tobytes()
    assert mine.poses.tobytes() == other.poses.tobytes()
    assert mine.peak.tobytes() == other.peak.tobytes()
    assert mine.averages.tobytes() == other.averages.tobytes()
    assert mine.criterion == other.criterion


@pytest.mark.parametrize("particles_a_block", [1, 5, 7])
def test_equal_bits_whatever_the_size_of_a_block(particles_a_block):
    images, references, poses = small.particles(), small.references(), small.poses()
    whole = run(images, references, poses, make_settings(images))
    stack, settings = ArrayStack(images), make_settings(images)
    in_blocks = Particles(stack, settings.inside, block_bytes=particles_a_block * 4 * BOX * BOX)
    cut = list(refine.refine(in_blocks, references, poses, settings, SERIAL))
    assert max(stop - start for start, stop in stack.blocks) == particles_a_block
    for mine, other in zip(cut, whole, strict=True):
        assert_same_bits(mine, other)


@pytest.mark.parametrize(("n_particles", "block_bytes", "expected"), [
    (7, 4 * 16 * 16 * 3, [(0, 3), (3, 6), (6, 7)]),
    (2, 1, [(0, 1), (1, 2)]),  # never less than one particle
    (0, 1, []),
])
def test_blocks_cover_all_particles_once(n_particles, block_bytes, expected):
    images = np.arange(n_particles, dtype=np.float32)[:, None, None] + np.zeros((16, 16), np.float32)
    of_stack = Particles(ArrayStack(images), np.ones((16, 16), bool), block_bytes=block_bytes)
    streamed = list(of_stack.stream(0, n_particles))
    assert [(block.start, block.stop) for block, _ in streamed] == expected
    for block, some in streamed:
        np.testing.assert_array_equal(some, images[block])


class Watched(ArrayStack):
    """Fails in the block from ``bad`` on, and says when a block is read."""

    def __init__(self, images, bad=None):
        super().__init__(images)
        self.bad, self.read_now = bad, {start: threading.Event() for start in range(len(images))}

    def read(self, start, stop):
        self.read_now[start].set()
        if start == self.bad:
            raise OSError(5, "Input/output error", "stack.hdf")
        return super().read(start, stop)


def test_the_next_block_is_read_while_one_is_in_work_but_no_other():
    stack = Watched(np.zeros((4, 8, 8), np.float32))
    for block, _ in Particles(stack, np.ones((8, 8), bool), block_bytes=1).stream(0, 4):
        following = block.stop
        if following < 4:
            assert stack.read_now[following].wait(60)
        if following < 3:
            assert not stack.read_now[following + 1].wait(0.05)


def test_what_goes_wrong_in_reading_ahead_is_raised_when_its_turn_comes():
    stack = Watched(np.zeros((4, 8, 8), np.float32), bad=2)
    stream = Particles(stack, np.ones((8, 8), bool), block_bytes=1).stream(0, 4)
    assert next(stream)[0] == slice(0, 1)
    assert next(stream)[0] == slice(1, 2)
    assert stack.read_now[2].wait(60)
    with pytest.raises(OSError, match="Input/output error") as caught:
        next(stream)
    assert caught.value.filename == "stack.hdf"
    assert not stack.read_now[3].is_set()


@pytest.mark.jit_only
def test_another_thread_runs_while_particles_are_searched():
    """Else reading ahead would wait for the search to end."""
    images, settings = np.tile(small.particles(), (200, 1, 1)), make_settings(small.particles())
    spectra = ring_spectra(average.normalize_references(small.references(), settings.inside), settings.search)
    steps, ended = [0], threading.Event()

    def count():
        while not ended.is_set():
            steps[0] += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=count)
    thread.start()
    before = steps[0]
    align(images, identity_poses(len(images)), spectra, settings.search)
    during = steps[0] - before
    ended.set()
    thread.join()
    assert during > 5


def test_no_thread_is_left_when_a_pass_ends_early():
    stream = Particles(Watched(np.zeros((4, 8, 8), np.float32)), np.ones((8, 8), bool), block_bytes=1).stream(0, 4)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read ahead")]


class Rank(type(SERIAL)):
    """One of several ranks, as far as its share of the particles goes."""

    def __init__(self, rank, size):
        self.rank, self.size, self.is_root = rank, size, rank == 0


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_shares_of_any_number_of_ranks_add_up_to_the_bits_of_one(size):
    images, references, poses = small.particles(), small.references(), small.poses()
    settings = make_settings(images)
    of_stack = Particles(ArrayStack(images), settings.inside)
    no_class = np.full(len(images), -1, np.int32)
    whole, whole_sums = refine._search_and_sum(of_stack, references, poses, 0, settings, SERIAL, 0, no_class)
    parts, sums = [], []
    for rank in range(size):
        comm = Rank(rank, size)
        start, stop = comm.share(len(images))
        found, summed = refine._search_and_sum(of_stack, references, poses[start:stop], start, settings, comm, 0,
                                               no_class)
        parts.append(found)
        sums.append(summed)
    for name in ("assign", "poses", "peak"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert joined.tobytes() == getattr(whole, name).tobytes()
    np.testing.assert_array_equal(sum(part.sums for part in sums), whole_sums.sums)
    assert {part.unit for part in sums} == {whole_sums.unit}


@pytest.mark.jit_only
def test_equal_bits_whatever_the_number_of_threads(set_threads):
    images, references, poses = small.particles(), small.references(), small.poses()
    whole = run(images, references, poses, make_settings(images))
    set_threads(1)
    for mine, other in zip(run(images, references, poses, make_settings(images)), whole, strict=True):
        assert_same_bits(mine, other)
