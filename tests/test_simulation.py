"""Simulated particles: the convention of their poses, their statistics, their files."""

import csv
import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from mrefali.ctf import CTF_PARAMETERS, ctf, parse_ctf
from mrefali.errors import InputError
from mrefali.geometry import (
    default_outer_radius,
    disc,
    from_matrices,
    identity_poses,
    make_poses,
    to_matrices,
)
from mrefali.io import open_stack
from mrefali.simulation import (
    DEFOCUS_UM,
    FILL,
    JUNK,
    TRUTH_COLUMNS,
    Views,
    class_sizes,
    largest_shift,
    make_views,
    read_truth,
    render,
    simulate,
    simulate_particles,
)


def blobs_at(views, view, x, y):
    """The view's density at the points (x, y) in px about the centre, blob by blob as the formula has it."""
    total = np.zeros(np.shape(x))
    for (cx, cy), sigma, height in zip(views.centres[view], views.sigmas, views.heights, strict=True):
        total += height * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * sigma**2))
    return total


def one_blob(box, x, y):
    return Views(box, np.array([[[float(x), float(y)]]]), np.array([1.5]), np.array([1.0]))


def brightest(image):
    """x, y in px about the centre of the brightest pixel."""
    y, x = np.unravel_index(image.argmax(), image.shape)
    return x - image.shape[1] // 2, y - image.shape[0] // 2


def files_in(directory):
    return sorted(path.name for path in directory.iterdir())


# what a pose means

@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize(("pose", "in_the_particle"), [
    ((0, 0, 0, 0), (7, 2)),
    ((90, 0, 0, 0), (-2, 7)),  # alpha=90 carries +y to +x: the view's blob at x=7 was at y=7
    ((0, 3, -1, 0), (4, 3)),  # p + s = (7, 2)
    ((0, 0, 0, 1), (-7, 2)),  # the flip of x is undone
    ((90, 3, -1, 1), (-3, -10)),  # rotate, shift, flip: (-3, -10) -> (-10, 3) -> (-7, 2) -> (7, 2)
])
def test_a_truth_pose_carries_the_particles_blob_onto_the_views(box, pose, in_the_particle):
    image = render(one_blob(box, 7, 2), np.array([0]), make_poses(*np.array(pose)[:, None]))[0]
    assert brightest(image) == in_the_particle
    assert image.max() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("box", [32, 33])
def test_each_pixel_carried_by_its_truth_pose_lands_on_the_views_density(box):
    views = make_views(3, box, seed=5)
    classes = np.array([0, 1, 2, 2])
    poses = make_poses([10.0, 123.4, 250.0, 359.0], [1.25, -2.0, 0.3, 2.9], [-0.5, 2.0, 1.7, -1.1],
                       [0, 1, 0, 1])
    images = render(views, classes, poses)
    y, x = np.indices((box, box)) - box // 2
    for image, view, matrix in zip(images, classes, to_matrices(poses), strict=True):
        on_view_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 3]
        on_view_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 3]
        np.testing.assert_allclose(image, blobs_at(views, view, on_view_x, on_view_y), rtol=1e-6, atol=1e-7)


def test_the_views_are_the_particles_of_the_identity_pose():
    particles = simulate_particles(4, n_views=4, box=32)
    views = make_views(4, 32, seed=0)
    np.testing.assert_array_equal(particles.views, render(views, np.arange(4), identity_poses(4)))
    y, x = np.indices((32, 32)) - 16
    np.testing.assert_allclose(particles.views[2], blobs_at(views, 2, x, y), rtol=1e-6, atol=1e-7)


def test_more_particles_than_a_block_are_rendered_as_one_by_one():
    views = make_views(2, 24, seed=1)
    rng = np.random.default_rng(2)
    classes = rng.integers(2, size=130)
    poses = make_poses(rng.uniform(0, 360, 130), 1.0, -1.0, rng.integers(2, size=130))
    images = render(views, classes, poses)
    for i in (0, 63, 64, 127, 128, 129):
        np.testing.assert_array_equal(images[i], render(views, classes[i : i + 1], poses[i : i + 1])[0])


# the phantom

def test_the_phantom_fills_its_share_of_the_box_in_no_direction_more():
    views = make_views(50, 64, seed=3)
    reach = np.linalg.norm(views.centres, axis=2) + 2 * views.sigmas
    assert reach.max() <= FILL * 64 / 2 + 1e-9
    # the outermost blob lies within acos(0.95) = 18 degrees of one of 50 planes through the centre
    assert reach.max() > 0.95 * FILL * 64 / 2


def test_every_view_is_centred_on_its_centre_of_mass():
    views = make_views(5, 64, seed=4)
    mass = views.heights * views.sigmas**2
    np.testing.assert_allclose(np.einsum("vbi,b->vi", views.centres, mass), 0.0, atol=1e-10)


def test_the_box_only_scales_the_phantom():
    small, large = make_views(3, 32, seed=6), make_views(3, 96, seed=6)
    np.testing.assert_allclose(large.centres, 3 * small.centres, rtol=1e-12)
    np.testing.assert_allclose(large.sigmas, 3 * small.sigmas, rtol=1e-12)
    np.testing.assert_array_equal(large.heights, small.heights)


def test_more_views_begin_with_the_same_ones():
    np.testing.assert_array_equal(make_views(7, 32, seed=6).centres[:3], make_views(3, 32, seed=6).centres)


def test_views_of_one_phantom_differ_also_when_turned_and_mirrored():
    views = make_views(4, 64, seed=0)
    angles = np.arange(0.0, 360.0, 3.0)
    turned = np.concatenate([make_poses(angles, mirror=0), make_poses(angles, mirror=1)])

    def unit(images):
        flat = images.reshape(len(images), -1).astype(float)
        flat -= flat.mean(axis=1, keepdims=True)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    references = unit(render(views, np.arange(4), identity_poses(4)))
    for k in range(4):
        best = (unit(render(views, np.full(len(turned), k), turned)) @ references.T).max(axis=0)
        assert best[k] == pytest.approx(1.0, abs=1e-6)
        assert np.delete(best, k).max() < 0.97


# the statistics of the particles

@pytest.mark.parametrize("snr", [0.05, 0.3, 4.0])
def test_the_snr_is_signal_over_noise_within_the_disc(snr):
    n, box = 100, 48
    clean, noisy = (simulate_particles(n, n_views=5, box=box, snr=value, seed=8).images.astype(float)
                    for value in (math.inf, snr))
    signal = clean[:, disc(box, default_outer_radius(box))].var(axis=1)
    noise = (noisy - clean).var(axis=(1, 2))
    # a variance from N Gaussian samples has the relative error sqrt(2/N); 5 times that, over all and for each
    assert (signal / noise).mean() == pytest.approx(snr, rel=5 * np.sqrt(2 / (n * box**2)) + 2 / box**2)
    np.testing.assert_allclose(signal / noise, snr, rtol=5 * np.sqrt(2 / box**2))


def test_the_snr_goes_by_the_disc_that_is_given():
    noise = [(simulate_particles(20, 4, 48, 0.3, seed=8, outer_radius=ou).images
              - simulate_particles(20, 4, 48, math.inf, seed=8).images).var() for ou in (12, 22)]
    assert noise[0] > 1.5 * noise[1]  # a smaller disc has less of the empty surroundings, so more variance


def test_the_noise_is_white_gaussian_and_differs_between_particles():
    clean, noisy = (simulate_particles(50, 5, 48, snr, seed=9).images.astype(float)
                    for snr in (math.inf, 0.3))
    noise = noisy - clean
    noise /= noise.std(axis=(1, 2), keepdims=True)
    limit = 5 / np.sqrt(noise.size)
    assert abs(noise.mean()) < limit
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 1.05 * limit
    assert abs((noise[:, :, 1:] * noise[:, :, :-1]).mean()) < 1.05 * limit
    assert abs((noise[1:] * noise[:-1]).mean()) < 1.05 * limit
    assert abs((noise**4).mean() - 3) < np.sqrt(96) * limit  # the variance of x^4 is 105 - 9


def test_poses_are_uniform_and_half_of_them_mirrored():
    n = 4000
    poses = simulate_particles(n, n_views=2, box=16, max_shift=2.5, seed=10).poses
    # the largest gap between a sample's distribution and the uniform one stays below 1.95 / sqrt(n) in 99.9 %
    for name, low, high in (("alpha", 0, 360), ("sx", -2.5, 2.5), ("sy", -2.5, 2.5)):
        values = np.sort(poses[name])
        assert low <= values[0]
        assert values[-1] <= high
        assert np.abs((values - low) / (high - low) - (np.arange(n) + 0.5) / n).max() < 1.95 / np.sqrt(n)
    assert abs(poses["mirror"].mean() - 0.5) < 5 * 0.5 / np.sqrt(n)
    assert abs(np.corrcoef([poses[name] for name in poses.dtype.names]) - np.eye(4)).max() < 5 / np.sqrt(n)


def test_without_mirrors_the_rest_of_the_poses_is_the_same():
    mirrored, plain = (simulate_particles(50, 5, 24, mirror=mirror).poses for mirror in (True, False))
    assert mirrored["mirror"].any()
    assert not plain["mirror"].any()
    for name in ("alpha", "sx", "sy"):
        np.testing.assert_array_equal(mirrored[name], plain[name])


def test_the_largest_shift_keeps_the_phantom_within_the_image():
    for box in (64, 65):
        images = simulate_particles(200, 4, box, math.inf, largest_shift(box), seed=11).images
        frame = np.ones((box, box), bool)
        frame[1:-1, 1:-1] = False
        # at two sigmas from the middle of a blob exp(-2) of its height is left, of some blobs at most
        assert images[:, frame].max() < 3 * math.exp(-2)
        assert images[:, frame].max() < 0.3 * images.max()


def test_classes_are_equal_by_default_and_mixed_over_even_and_odd():
    classes = simulate_particles(400, n_views=4, box=24, seed=12).classes
    np.testing.assert_array_equal(np.bincount(classes), [100] * 4)
    even = np.bincount(classes[::2])
    assert (np.abs(even - 50) < 5 * np.sqrt(100 * 0.25)).all()


def test_relative_sizes_give_exact_class_sizes():
    classes = simulate_particles(76, n_views=3, box=24, sizes=[20, 10, 8]).classes
    np.testing.assert_array_equal(np.bincount(classes), [40, 20, 16])


@pytest.mark.parametrize(("n_particles", "n_views", "sizes", "counts"), [
    (10, 3, None, [4, 3, 3]),
    (11, 3, None, [4, 4, 3]),
    (10, 3, [1, 1, 2], [3, 2, 5]),
    (7, 2, [0.3, 0.1], [5, 2]),
    (100, 3, [1e-3, 5e-3, 4e-3], [10, 50, 40]),
    (9, 2, [1.6e308, 0.8e308], [6, 3]),
])
def test_what_is_left_goes_to_the_largest_remainders(n_particles, n_views, sizes, counts):
    np.testing.assert_array_equal(class_sizes(n_particles, n_views, sizes), counts)


# the same seed, the same particles

def test_a_seed_gives_the_same_particles_and_another_seed_others():
    first, again, other = (simulate_particles(20, 4, 24, seed=seed) for seed in (7, 7, 8))
    for name in ("images", "views", "classes", "poses"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name)), name


def test_a_particle_is_the_same_among_few_and_among_many():
    few, many = (simulate_particles(n, 1, 24, seed=7) for n in (30, 100))
    np.testing.assert_array_equal(few.images, many.images[:30])
    np.testing.assert_array_equal(few.poses, many.poses[:30])


def test_the_number_of_threads_changes_nothing():
    results = []
    for n_threads in (1, 2):
        with threadpool_limits(n_threads):
            results.append(simulate_particles(70, 4, 128, seed=7).images)
    np.testing.assert_array_equal(results[0], results[1])


def test_arrays_have_the_documented_types_and_shapes():
    particles = simulate_particles(6, 3, 25)
    assert (particles.images.shape, particles.images.dtype) == ((6, 25, 25), np.float32)
    assert (particles.views.shape, particles.views.dtype) == ((3, 25, 25), np.float32)
    assert (particles.classes.shape, particles.classes.dtype) == ((6,), np.int64)
    assert particles.poses.shape == (6,)


# files

def test_the_files_hold_what_simulate_particles_gives(tmp_path):
    simulate(tmp_path / "a.hdf", n_particles=12, n_views=3, box=25, snr=0.5, sizes=[3, 2, 1],
             pixel_size=1.7, seed=4)
    assert files_in(tmp_path) == ["a.hdf", "a_truth.csv", "a_views.hdf"]
    expected = simulate_particles(12, 3, 25, 0.5, sizes=[3, 2, 1], seed=4)
    for name, images in (("a.hdf", expected.images), ("a_views.hdf", expected.views)):
        with h5py.File(tmp_path / name) as file:
            groups = file["MDF/images"]
            assert groups.attrs["imageid_max"] == len(images) - 1
            for i, image in enumerate(images):
                np.testing.assert_array_equal(groups[str(i)]["image"][()], image)
                assert groups[str(i)].attrs["EMAN.apix_x"][0] == 1.7
    classes, poses = read_truth(tmp_path / "a_truth.csv")
    np.testing.assert_array_equal(classes, expected.classes)
    np.testing.assert_array_equal(poses, expected.poses)  # to the last digit


def test_the_stack_stands_in_the_identity_pose(tmp_path):
    simulate(tmp_path / "a.hdf", n_particles=4, n_views=2, box=16, max_shift=1)
    with h5py.File(tmp_path / "a.hdf") as file:
        for i in range(4):
            stored = file[f"MDF/images/{i}"].attrs["EMAN.xform.align2d"][0]
            assert from_matrices(np.array(stored.tolist()).reshape(3, 4)) == identity_poses(1)[0]


def test_the_truth_is_a_plain_table(tmp_path):
    simulate(str(tmp_path / "a.hdf"), n_particles=5, n_views=2, box=16, max_shift=1)
    with open(tmp_path / "a_truth.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == TRUTH_COLUMNS
    assert [row["index"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert {row["class"] for row in rows} == {"0", "1"}
    assert {row["mirror"] for row in rows} <= {"0", "1"}


@pytest.mark.parametrize("name", ["a.hdf", "a_truth.csv", "a_views.hdf"])
def test_nothing_is_overwritten_or_created_beside_a_file_that_exists(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} exists: give another name, or remove it first"):
        simulate(tmp_path / "a.hdf", n_particles=8)
    assert files_in(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.hdf cannot be made: there is no folder .*nowhere, make it first"):
        simulate(tmp_path / "nowhere" / "a.hdf")


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode, **_: False)  # permissions bind no superuser
    with pytest.raises(PermissionError, match="a.hdf cannot be made: no permission to write into "):
        simulate(tmp_path / "a.hdf")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("name", ["a.mrcs", "a", "a.hdf.gz"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"/a.* is not allowed: give a file name that ends in \.hdf"):
        simulate(tmp_path / name)
    assert files_in(tmp_path) == []


BAD = [
    ({"n_particles": 0}, "n_particles=0 is not allowed: give a whole number of at least n_views=8"),
    ({"n_particles": 7}, "n_particles=7 is not allowed: give a whole number of at least n_views=8"),
    ({"n_particles": 1000.0}, "n_particles=1000.0 is not allowed: give a whole number"),
    ({"n_particles": "many"}, "n_particles='many' is not allowed: give a whole number"),
    ({"n_views": 0}, "n_views=0 is not allowed: give a whole number of at least 1"),
    ({"n_views": True}, "n_views=True is not allowed: give a whole number of at least 1"),
    ({"box": 15}, "box=15 is not allowed: give a whole number of at least 16"),
    ({"snr": 0}, "snr=0 is not allowed: give a number of at least 1e-6, or inf for no noise"),
    ({"snr": math.nan}, "snr=nan is not allowed"),
    ({"snr": "0.3"}, "snr='0.3' is not allowed"),
    ({"max_shift": -1}, "max_shift=-1 is not allowed: give 0 to 12.41 px"),
    ({"max_shift": 12.5}, "max_shift=12.5 is not allowed: give 0 to 12.41 px, .* within a 64-pixel image"),
    ({"mirror": "no"}, "mirror='no' is not allowed: give True or False"),
    ({"mirror": 2}, "mirror=2 is not allowed: give True or False"),
    ({"sizes": [1, 2]}, r"sizes=\[1, 2\] is not allowed: give a list of n_views=8 numbers above 0"),
    ({"sizes": "20:10"}, "sizes='20:10' is not allowed: give a list"),
    ({"sizes": 3, "n_views": 1}, "sizes=3 is not allowed: give a list"),
    ({"sizes": [1, 0], "n_views": 2}, r"sizes=\[1, 0\] is not allowed"),
    ({"sizes": [1, math.inf], "n_views": 2}, r"sizes=\[1, inf\] is not allowed"),
    ({"sizes": [1000, 1], "n_views": 2, "n_particles": 20},
     "leave view 1 without one of n_particles=20: give more particles"),
    ({"nearly_symmetric": "no"}, "nearly_symmetric='no' is not allowed: give True or False"),
    ({"CTF": 2}, "CTF=2 is not allowed: give True or False"),
    ({"junk": -0.1}, "junk=-0.1 is not allowed: give a share from 0"),
    ({"junk": 1.0}, "junk=1.0 is not allowed"),
    ({"junk": math.inf}, "junk=inf is not allowed"),
    ({"junk": 0.9, "n_particles": 40}, "to what leaves one of n_particles=40 for each of n_views=8"),
    ({"seed": -1}, "seed=-1 is not allowed: give a whole number of at least 0"),
    ({"seed": 1.5}, "seed=1.5 is not allowed"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_a_bad_argument_is_named_and_nothing_is_created(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        simulate_particles(**({"n_particles": 40} | arguments))
    with pytest.raises(InputError, match=message):
        simulate(tmp_path / "a.hdf", **arguments)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("pixel_size", [0, -2.0, math.inf, math.nan, "2", None])
def test_a_bad_pixel_size_is_named(tmp_path, pixel_size):
    with pytest.raises(InputError, match="pixel_size=.* is not allowed: give a number of Angstrom above 0"):
        simulate(tmp_path / "a.hdf", pixel_size=pixel_size)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("outer_radius", [0, 31, -2])
def test_a_disc_that_does_not_fit_is_refused(outer_radius):
    with pytest.raises(InputError, match=f"ou={outer_radius} does not fit a 64-pixel image: give 1 to 30"):
        simulate_particles(8, outer_radius=outer_radius)


# reading the truth

HEADER = "index,class,alpha,sx,sy,mirror\n"


def test_a_missing_truth_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.csv: there is no such file; .* writes OUT_truth.csv"):
        read_truth(tmp_path / "none.csv")


@pytest.mark.parametrize(("text", "message"), [
    ("", "the first line is '': a truth file has the columns index,class,alpha,sx,sy,mirror"),
    ("a,b\n0,0\n", "the first line is 'a,b': a truth file has the columns"),
    (HEADER, "holds no particle"),
    (HEADER + "0,0,1.0,0,0,0\n2,0,1.0,0,0,0\n", "line 3 is '2,0,1.0,0,0,0': give .* with index 1"),
    (HEADER + "0,0,1.0,0,0\n", "line 2 is '0,0,1.0,0,0': give index,class,alpha,sx,sy,mirror"),
    (HEADER + "0,0,1.0,0,0,0,9\n", "line 2 is"),
    (HEADER + "0,0,x,0,0,0\n", "line 2 is '0,0,x,0,0,0'"),
    (HEADER + "0,0,nan,0,0,0\n", "finite numbers"),
    (HEADER + "0,0,1,0,0,2\n", "mirror 0 or 1"),
    (HEADER + "0,-2,1,0,0,1\n", "class >= 0 or -1 for junk"),
])
def test_a_bad_truth_file_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_truth(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# what makes particles harder


def turned_by_half(image):
    """Every pixel carried to the other side of pixel n//2, which leaves out row and column 0 of an even box."""
    return image[1:, 1:][::-1, ::-1]


def test_views_of_a_nearly_symmetric_phantom_look_nearly_the_same_turned_by_half():
    # of a pair of heights 1 and 0.7 the part that turning negates has (0.3/1.7)^2 of the power of the other, for
    # a correlation of 0.94; how blobs overlap and the mean of the image make it more or less
    for nearly_symmetric, low, high in ((False, -1.0, 0.8), (True, 0.9, 0.99)):
        views = make_views(6, 64, seed=3, nearly_symmetric=nearly_symmetric)
        for image in render(views, np.arange(6), identity_poses(6)):
            alike = np.corrcoef(image[1:, 1:].ravel(), turned_by_half(image).ravel())[0, 1]
            assert low < alike < high


def test_junk_has_no_class_and_shows_no_view():
    clean = simulate_particles(50, 4, 32, math.inf, seed=5, junk=0.1, max_shift=0.0, mirror=False)
    junk = clean.classes == JUNK
    assert junk.sum() == 5
    np.testing.assert_array_equal(np.sort(np.bincount(clean.classes[~junk])), [11, 11, 11, 12])
    expected = render(make_views(4, 32, seed=5), clean.classes[~junk], clean.poses[~junk])
    np.testing.assert_array_equal(clean.images[~junk], expected)
    shown = clean.images[junk].reshape(5, -1)
    assert np.corrcoef(shown)[np.triu_indices(5, 1)].max() < 0.95  # and no two of them are the same


def test_poses_and_noise_do_not_depend_on_junk_or_ctf():
    plain = simulate_particles(20, 2, 32, seed=5)
    for options in ({"junk": 0.2}, {"CTF": True}, {"nearly_symmetric": True}):
        np.testing.assert_array_equal(simulate_particles(20, 2, 32, seed=5, **options).poses, plain.poses)


@pytest.mark.parametrize("box", [32, 33])
def test_with_a_ctf_a_particle_is_its_view_times_the_ctf(box):
    options = {"n_particles": 3, "n_views": 2, "box": box, "snr": math.inf, "seed": 6}
    plain, multiplied = simulate_particles(**options), simulate_particles(**options, CTF=True, pixel_size=3.0)
    # in a box twice as wide, as the search takes it, and cut out in the end
    for image, pose, view, values in zip(multiplied.images, plain.poses, plain.classes, multiplied.ctf, strict=True):
        views = make_views(2, box, seed=6)
        wide = render(replace(views, box=2 * box), np.array([view]), pose[None])[0]
        grid = np.fft.irfft2(np.fft.rfft2(wide) * ctf(values, 2 * box), s=wide.shape)
        first = box - box // 2
        np.testing.assert_allclose(image, grid[first:first + box, first:first + box], atol=1e-4 * np.abs(grid).max())
        assert values["pixel_size_A"] == 3.0


def test_every_particle_has_a_ctf_of_its_own_in_its_header(tmp_path):
    simulate(tmp_path / "a.hdf", n_particles=8, n_views=2, box=16, max_shift=1.0, pixel_size=1.5, CTF=True, seed=1)
    stack = open_stack(tmp_path / "a.hdf")
    values = np.array([parse_ctf(text) for text in stack.column("ctf")])
    expected = simulate_particles(8, 2, 16, max_shift=1.0, pixel_size=1.5, CTF=True, seed=1).ctf
    for name in CTF_PARAMETERS.names:
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-9)
    assert stack.column("ctf_applied") == [0] * 8
    assert np.unique(values["defocus_um"]).size == 8
    assert DEFOCUS_UM[0] <= values["defocus_um"].min() < values["defocus_um"].max() <= DEFOCUS_UM[1]


def test_the_snr_counts_the_signal_after_the_ctf():
    options = {"n_particles": 20, "n_views": 2, "box": 32, "seed": 7, "CTF": True}
    clean, noisy = (simulate_particles(snr=snr, **options).images for snr in (math.inf, 0.1))
    inside = disc(32, default_outer_radius(32))
    noise = (noisy - clean).var(axis=(1, 2))
    # the variance of 1024 pixels is known to sqrt(2/1024), 4.4 %; at 4.5 times that
    np.testing.assert_allclose(clean[:, inside].var(axis=1) / noise, 0.1, rtol=0.2)
