"""The references that a run of ``classify`` begins with: seeds found in some of its particles, at full size.

Knows no file; reads through whatever stack it is given. The root finds the seeds, the other ranks wait.
"""

import logging

import numpy as np

from mrefali import average, geometry, signals
from mrefali.classes import average_classes, members_of
from mrefali.fourier import shrink
from mrefali.seeding import find_seeds, search_of

logger = logging.getLogger(__name__)

#: Particles drawn for each class asked for, in which the seeds are found.
PARTICLES_A_CLASS = 100


def find_references(particles, settings, n_classes, comm):
    """Averages of seeds, the largest class first.

    Parameters
    ----------
    particles : Particles
    settings : refine.Settings
    n_classes : int
        At most; fewer where no more are found, see :mod:`mrefali.seeding`.
    comm
        See :mod:`mrefali.parallel`.

    Returns
    -------
    (n_references, n, n) float32
        On every rank.
    """
    with comm.agreeing():
        try:
            references = _find(particles, settings, n_classes) if comm.is_root else None
        finally:
            comm.barrier()  # where the others wait without keeping a core busy
    return comm.from_root(references)


def _find(particles, settings, n_classes):
    rng = np.random.default_rng(settings.rand_seed)
    n_drawn = min(particles.n_images, PARTICLES_A_CLASS * n_classes)
    drawn = np.sort(rng.choice(particles.n_images, n_drawn, replace=False))
    full = settings.search
    search, factor = search_of(full.box, full.outer_radius, max(full.xr, full.yr), full.mirror)
    blocks = [drawn[first:first + particles.block_size] for first in range(0, n_drawn, particles.block_size)]
    images = np.concatenate([_small(particles.read(numbers), factor) for numbers in blocks])
    average.normalize_particles(images, geometry.disc(search.box, search.outer_radius))
    logger.info("seeds: in %d particles of %d x %d px, %d classes at most", n_drawn, search.box, search.box, n_classes)
    seeds = find_seeds(images, n_classes, search, rng, _report)

    poses = seeds.poses.copy()
    for name in ("sx", "sy"):
        poses[name] *= factor
    sums = average.ClassSums(seeds.n_classes, full.box, particles.n_images, settings.largest,
                             particles.ctf is not None, settings.move)
    for first in range(0, n_drawn, particles.block_size):
        some = slice(first, first + particles.block_size)
        numbers = drawn[some]
        sums.add(particles.read(numbers), poses[some], seeds.assign[some], np.arange(n_drawn)[some],
                 particles.ctf_sq(numbers))
    # the largest has at least as many particles as an average needs, see checks
    members = members_of(seeds.assign, seeds.n_classes)
    made = [c for c in average_classes(sums, members, poses, settings) if c is not None]
    logger.info("seeds: %d classes of %s particles", len(made), "/".join(str(c.count) for c in made))
    return np.stack([c.image for c in made])


def _small(images, factor):
    return images if factor == 1 else shrink(images, factor)


def _report(text):
    signals.check()
    logger.info("seeds: %s", text)
