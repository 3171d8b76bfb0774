"""Averages by Fourier interpolation: named, refused, and nearer to the truth where detail is finest."""

import numpy as np
import pytest
import small

from mrefali import align, average
from mrefali.errors import InputError
from mrefali.fourier import INTERPOLATIONS
from mrefali.simulation import simulate_particles


def test_fourier_interpolation_loses_less_of_the_view_near_nyquist():
    particles = simulate_particles(200, 1, 64, snr=1.0, seed=1)
    kept = {}
    for name, move in INTERPOLATIONS.items():
        sums = move(particles.images, particles.poses).sum(axis=0, dtype=np.float64)
        kept[name] = average.frc(sums, particles.views[0].astype(np.float64))[24:, 1].mean()
    # the same noise in both, so that the difference is known better than either
    assert kept["fourier"] > kept["quadratic"] + 0.02


def test_the_averages_are_those_of_the_interpolation_named():
    options = {"ou": 6, "xr": 1, "yr": 1, "maxit": 1, "function": "ref_unfiltered", "center": 0}
    results = {name: align(small.particles(), small.references(), interpolation=name, **options)
               for name in INTERPOLATIONS}
    one, other = results["quadratic"], results["fourier"]
    np.testing.assert_array_equal(one.poses, other.poses)
    assert not np.array_equal(one.averages, other.averages)
    images = small.particles()
    inside = np.hypot(*np.indices((small.BOX, small.BOX)) - small.BOX // 2) <= 6
    average.normalize_particles(images, inside)
    mean = INTERPOLATIONS["fourier"](images, other.poses)[other.assign == 0].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(other.averages[0], (mean - mean[inside].mean()) * inside, atol=1e-5)


def test_another_name_is_refused():
    with pytest.raises(InputError, match="interpolation=cubic is not known: give quadratic or fourier"):
        align(small.particles(), small.references(), ou=6, interpolation="cubic")
