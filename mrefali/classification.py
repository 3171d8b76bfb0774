"""The references that a run of ``classify`` begins with: seeds found in some of its particles, at full size.

Knows no file; reads through whatever stack it is given. The root finds the seeds, the other ranks wait.
"""

import time

import numpy as np

from mrefali import average, geometry, seeding
from mrefali.classes import average_class, members_of, tallies_of
from mrefali.fourier import shrink
from mrefali.neighbours import coarse_search
from mrefali.search import align_each, ring_spectra
from mrefali.seeding import find_seeds, search_of

#: Particles drawn for each class asked for, in which the seeds are found, and drawn at least: of so many a view of 2 %
#: has forty and a class, where fifteen of 800 often have none.
PARTICLES_A_CLASS, FEWEST_PARTICLES = 100, 2000

#: Particles and references that are timed for an estimate, and how many times as long as to align all first references
#: once it takes to find seeds: measured, 13 to 16 with 8 classes of 8 views, but 100 with 4 classes of these, which are
#: cut and dropped time and again.
TIMED_PARTICLES, TIMED_REFERENCES, TIMES_AS_LONG = 64, 8, 16


def n_drawn(n_particles, n_classes):
    """How many particles the seeds are found in."""
    return min(n_particles, max(PARTICLES_A_CLASS * n_classes, FEWEST_PARTICLES))


def bytes_needed(n_particles, n_classes, search):
    """Memory that :func:`find_references` takes at the root; ``search`` is that of the run."""
    small, _ = _small_search(search)
    return seeding.bytes_needed(n_drawn(n_particles, n_classes), n_classes, small.box)


def estimate_seconds(particles, settings, n_classes):
    """About how long :func:`find_references` takes, by how long some particles take with some as references, in s."""
    search, factor = _small_search(settings.search)
    images = _small_images(particles, np.arange(min(TIMED_PARTICLES, particles.n_images)), search, factor)
    spectra, coarse = ring_spectra(images[:TIMED_REFERENCES], search), coarse_search(search)
    for some in (images[:1], images):  # the first loads what is compiled
        began = time.perf_counter()
        align_each(some, geometry.identity_poses(len(some)), spectra, coarse)
    seconds = time.perf_counter() - began
    n_pairs = seeding.n_first_pairs(n_drawn(particles.n_images, n_classes), n_classes)
    return TIMES_AS_LONG * seconds * n_pairs / (len(images) * len(spectra.constants))


def find_references(particles, settings, n_classes, comm, report):
    """Averages of seeds, the largest class first, and the particles they are made of.

    Parameters
    ----------
    particles : Particles
    settings : refine.Settings
    n_classes : int
        At most; fewer where no more are found, see :mod:`mrefali.seeding`.
    comm
        See :mod:`mrefali.parallel`.
    report : callable
        Is told in words at the root, every few seconds or minutes, how far things are; what it raises ends the search.

    Returns
    -------
    references : (n_references, n, n) float32
        On every rank, as the other.
    classes : (n_particles,) int32
        -1 for particles that are part of none.
    """
    return comm.made_by_root(lambda: _find(particles, settings, n_classes, report))


def _find(particles, settings, n_classes, report):
    rng = np.random.default_rng(settings.rand_seed)
    n = n_drawn(particles.n_images, n_classes)
    drawn = np.sort(rng.choice(particles.n_images, n, replace=False))
    full = settings.search
    search, factor = _small_search(full)
    images = _small_images(particles, drawn, search, factor)
    report(f"in {n} particles of {search.box} x {search.box} px, {n_classes} classes at most")
    ctf = None
    if particles.ctf is not None:
        ctf = particles.ctf.parameters[drawn]
        ctf["pixel_size_A"] *= factor
    seeds = find_seeds(images, n_classes, search, rng, report, ctf)

    poses = seeds.poses.copy()
    for name in ("sx", "sy"):
        poses[name] *= factor
    sums = settings.class_sums(seeds.n_classes, particles)
    for first in range(0, n, particles.block_size):
        some = slice(first, first + particles.block_size)
        numbers = drawn[some]
        sums.add(particles.read(numbers), poses[some], seeds.assign[some], np.arange(n)[some],
                 particles.ctf_sq(numbers))
    # the largest has at least as many particles as an average needs, see checks
    tallies = tallies_of(members_of(seeds.assign, seeds.n_classes), poses, settings)
    sizes = "/".join(str(t.counts.sum()) for t in tallies)
    report(f"{len(tallies)} classes of {sizes} particles"
           + (f"; no more could be told apart, of the {n_classes} asked for" if len(tallies) < n_classes else ""))
    references = np.stack([average_class(tally, sums, tally.k, settings).image for tally in tallies])
    classes = np.full(particles.n_images, -1, np.int32)
    reference_of = np.full(seeds.n_classes, -1, np.int32)
    reference_of[[tally.k for tally in tallies]] = np.arange(len(tallies))
    classes[drawn] = reference_of[seeds.assign]
    return references, classes


def _small_search(search):
    return search_of(search.box, search.outer_radius, max(search.xr, search.yr), search.mirror)


def _small_images(particles, numbers, search, factor):
    """Normalised particles as :func:`mrefali.seeding.find_seeds` takes them, (n, search.box, search.box) float32."""
    blocks = (numbers[first:first + particles.block_size] for first in range(0, len(numbers), particles.block_size))
    images = np.concatenate([particles.read(block) if factor == 1 else shrink(particles.read(block), factor)
                             for block in blocks])
    average.normalize_particles(images, geometry.disc(search.box, search.outer_radius))
    return images
