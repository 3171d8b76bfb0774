"""The demo: particles with a known answer, references that are not the answer, the main job, and a comparison.

It does what a user would do, on files that stay. Nothing but the command line may import it.
"""

import os
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from mrefali import average, geometry
from mrefali.accuracy import compare
from mrefali.checks import check_new_directory, use_threads
from mrefali.io import open_stack, write_stack
from mrefali.run import mref_ali2d
from mrefali.simulation import read_truth, simulate

BOX, SNR, PIXEL_SIZE_A, SEED = 64, 0.2, 2.0, 0
#: Particles of each view; unequal, as in real data.
SIZES = (180, 132, 96, 72, 60, 60)
OUTER_RADIUS, HALF_RANGE, ITERATIONS = 27, 3, 5

#: An initial reference is the mean of a few particles, each turned (degrees) and moved (px) away from the truth by
#: up to so much, blurred by a Gaussian (sigma in px).
PARTICLES_AVERAGED, LARGEST_TURN, LARGEST_SLIP, BLUR = 10, 15.0, 2.0, 1.5


def demo(outdir="mrefali_demo", *, threads=0):
    """Simulate a small stack, align it, compare the result with the truth, and print what was found.

    Parameters
    ----------
    outdir : str or Path
        Directory for everything; made here, must not exist.
    threads : int
        0: all cores this process may use.

    Returns
    -------
    mrefali.accuracy.Comparison

    Raises
    ------
    InputError, FileExistsError, FileNotFoundError, PermissionError
        Nothing was created then.
    """
    with use_threads(threads):
        check_new_directory(outdir)
        os.mkdir(outdir)
        stack, refs, run = (str(Path(outdir, name)) for name in ("particles.hdf", "references.hdf", "run"))
        print(f"1. simulate {sum(SIZES)} particles of {len(SIZES)} views, {BOX} x {BOX} px, SNR {SNR:g}: {stack}")
        simulate(stack, sum(SIZES), len(SIZES), BOX, SNR, HALF_RANGE, sizes=SIZES, pixel_size=PIXEL_SIZE_A, seed=SEED)
        classes, true_poses = read_truth(Path(outdir, "particles_truth.csv"))
        print(f"2. make poor references, each the mean of {PARTICLES_AVERAGED} particles turned up to "
              f"{LARGEST_TURN:g} degrees and moved up to {LARGEST_SLIP:g} px away from the truth, blurred: {refs}")
        particles = open_stack(stack)
        write_stack(refs, poor_references(particles.read(0, particles.n_images), classes, true_poses),
                    pixel_size_A=PIXEL_SIZE_A)
        print(f"3. mrefali mref_ali2d {stack} {refs} {run} --ou={OUTER_RADIUS} --xr={HALF_RANGE} --yr={HALF_RANGE} "
              f"--maxit={ITERATIONS}\n   (the first run of all compiles the search, which takes up to a minute)")
        mref_ali2d(stack, refs, run, ou=OUTER_RADIUS, xrng=HALF_RANGE, yrng=HALF_RANGE, maxit=ITERATIONS,
                   threads=threads)
        aligned = open_stack(stack)
        found = compare(aligned.column("assign"), aligned.poses(), classes, true_poses, len(SIZES), len(SIZES))
    _report(found, stack, run)
    return found


def poor_references(images, classes, true_poses):
    """Initial references that a run must improve: means of few, badly aligned particles, blurred.

    All are scaled to the same standard deviation: the method compares plain correlations, so that of two references
    the one with more contrast wins particles that belong to the other.

    Parameters
    ----------
    images : (n_particles, n, n) float32
    classes : (n_particles,) int array
        The view of each, counted from 0; each view has at least ``PARTICLES_AVERAGED``.
    true_poses : (n_particles,) POSE
        Carry each particle onto its view.

    Returns
    -------
    (n_views, n, n) float32
        Mean 0 and standard deviation 1 over the disc ``OUTER_RADIUS``.
    """
    rng = np.random.default_rng(SEED)
    used = np.stack([np.flatnonzero(classes == view)[:PARTICLES_AVERAGED] for view in range(classes.max() + 1)])
    turn = rng.uniform(-LARGEST_TURN, LARGEST_TURN, used.shape)
    slip_x, slip_y = rng.uniform(-LARGEST_SLIP, LARGEST_SLIP, (2, *used.shape))
    wrong_poses = geometry.compose(true_poses[used], geometry.make_poses(turn, slip_x, slip_y))

    inside = geometry.disc(images.shape[1], OUTER_RADIUS)
    chosen = images[used.ravel()]
    average.normalize_particles(chosen, inside)
    moved = average.transform(chosen, wrong_poses.ravel()).reshape(*used.shape, *images.shape[1:])
    references = gaussian_filter(moved.mean(axis=1), (0, BLUR, BLUR))
    average.normalize_particles(references, inside)
    return references


def _report(found, stack, run):
    print(f"4. against the truth: {100 * found.class_share:.1f} % of the particles are in the right class, of these "
          f"{100 * found.mirror_share:.1f} % with the right mirror;\n"
          f"   half of the angles are within {found.angle_error_median:.2f} degrees, half of the shifts within "
          f"{found.shift_error_median:.2f} px (the search goes in steps of 1 px)")
    stem = stack.removesuffix(".hdf")
    print(f"   averages  {run}/multi_ref.hdf\n"
          f"   poses     {run}/poses.csv, and the headers of {stack}\n"
          f"   log       {run}/mrefali.log\n"
          f"   truth     {stem}_truth.csv, {stem}_views.hdf")
