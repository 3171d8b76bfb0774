"""The references that a run of ``classify`` begins with: seeds found in some of its particles, at full size.

Knows no file; reads through whatever stack it is given. The root finds the seeds, the other ranks wait.
"""

import logging

import numpy as np

from mrefali import average, geometry, signals
from mrefali.classes import SMALLEST_CLASS, update_classes
from mrefali.fourier import shrink
from mrefali.search import Alignments
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
        references = _find(particles, settings, n_classes) if comm.is_root else None
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
    # classes too small for an average are at the end
    n_kept = max(1, int((np.bincount(seeds.assign) >= SMALLEST_CLASS).sum()))
    sums = average.ClassSums(n_kept, full.box, particles.n_images, settings.largest, particles.ctf is not None,
                             settings.move)
    found = Alignments(seeds.assign, poses, np.zeros(n_drawn))
    for first in range(0, n_drawn, particles.block_size):
        some = np.arange(first, min(first + particles.block_size, n_drawn))
        some = some[seeds.assign[some] < n_kept]
        numbers = drawn[some]
        # the halves go by the order in which they were drawn, as in the seeds
        sums.add(particles.read(numbers), poses[some], seeds.assign[some], some, particles.ctf_sq(numbers))
    kept = seeds.assign < n_kept
    found = Alignments(found.assign[kept], found.poses[kept], found.peak[kept])
    none = np.zeros((n_kept, full.box, full.box), np.float32)
    updates = update_classes(sums, found, none, particles, settings, None)
    logger.info("seeds: %d classes of %s particles", n_kept, "/".join(str(update.count) for update in updates))
    return np.stack([update.image for update in updates])


def _small(images, factor):
    return images if factor == 1 else shrink(images, factor)


def _report(text):
    signals.check()
    logger.info("seeds: %s", text)
