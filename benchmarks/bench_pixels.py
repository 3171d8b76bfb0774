"""What an iteration does to pixels beside the search, on one thread, at 64 and 128 px."""

import numba
import numpy as np
import pytest
from measure import particles_and_averages

from mrefali import average
from mrefali.compiled import kernels
from mrefali.geometry import disc, make_poses

N_IMAGES, N_CLASSES = 64, 10


@pytest.fixture(params=[64, 128], ids=["64px", "128px"])
def images(request):
    numba.set_num_threads(1)
    return particles_and_averages(N_IMAGES, N_CLASSES, request.param, 3)[0]


def test_normalize_64_particles(benchmark, images):
    box = images.shape[1]
    benchmark(average.normalize_particles, images, disc(box, box // 2 - 5))


def test_transform_64_particles(benchmark, images):
    rng = np.random.default_rng(0)
    poses = make_poses(rng.uniform(0, 360, N_IMAGES), *rng.uniform(-3, 3, (2, N_IMAGES)), rng.integers(0, 2, N_IMAGES))
    benchmark(average.transform, images, poses)


def test_add_64_particles_to_classes(benchmark, images):
    sums = np.zeros((N_CLASSES, 2, *images.shape[1:]), np.int64)
    numbers = np.arange(N_IMAGES)
    benchmark(kernels.add_to_classes, images, numbers % N_CLASSES, numbers % 2, 2.0**-40, sums)


def test_frc_of_two_halves(benchmark, images):
    benchmark(average.frc, *images[:2].astype(float))
