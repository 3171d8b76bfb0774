"""Noisy particles as classes are found in: a box of 32 px, normalised."""

from mrefali.average import normalize_particles
from mrefali.geometry import disc
from mrefali.simulation import simulate_particles

BOX, RADIUS = 32, 12


def particles(n=120, views=3, snr=1.0, seed=0, max_shift=1.0, **options):
    made = simulate_particles(n, views, BOX, snr, max_shift, seed=seed, **options)
    images = made.images.copy()
    normalize_particles(images, disc(BOX, RADIUS))
    return images, made
