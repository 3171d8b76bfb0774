"""The output directory of a run that never was, of any number of classes, written by what writes real ones."""

import numpy as np
from scipy.ndimage import gaussian_filter

from mrefali import geometry
from mrefali.classes import ClassUpdate
from mrefali.io import write_stack
from mrefali.outdir import OutputDirectory
from mrefali.reference import TanhFilter
from mrefali.refine import Iteration

PIXEL_SIZE_A = 2.0


def write(place, *, n_classes=6, n_particles=60, box=32, n_iterations=2, vanished=(), with_stack=True,
          pixel_size_A=PIXEL_SIZE_A, finished=True, **parameters):
    """Write ``stack.hdf`` and the directory ``out`` into ``place``; the path of ``out`` as str.

    Classes differ in size and resolution: the later, the smaller and poorer. Those ``vanished`` hold two particles. The
    average of each is most like that of class 0, by 0.5, and that of 0 is like the last.
    """
    rng = np.random.default_rng(0)
    blobs = gaussian_filter(rng.standard_normal((n_classes, box, box)), (0, box / 20, box / 20))
    views = (blobs * geometry.disc(box, box // 3) / blobs.std()).astype(np.float32)
    shares = np.linspace(2, 1, n_classes)
    shares[list(vanished)] = 0
    assign = np.concatenate([np.tile(vanished, 2).astype(int),
                             rng.choice(n_classes, n_particles - 2 * len(vanished), p=shares / shares.sum())])
    poses = geometry.make_poses(rng.uniform(0, 360, n_particles), *rng.uniform(-2, 2, (2, n_particles)),
                                rng.integers(0, 2, n_particles))
    stack = str(place / "stack.hdf")
    if with_stack:
        noisy = views[assign] + rng.standard_normal((n_particles, box, box)).astype(np.float32)
        write_stack(stack, noisy, [{"xform.align2d": m} for m in geometry.to_matrices(poses)], pixel_size_A)
    with OutputDirectory(str(place / "out"), pixel_size_A) as output:
        output.write_parameters({
            "stack": stack, "xrng": 2.0, "yrng": 2.0, "step": 1.0, "maxit": n_iterations, "n_particles": n_particles,
            "n_references": n_classes, "box": box, "pixel_size_A": pixel_size_A, "outer_radius": box // 2 - 4,
            "mrefali": "0.1.0", **parameters})
        output.write_start(None, geometry.identity_poses(n_particles))
        for i in range(n_iterations):
            iteration = _iteration(i, assign, poses, views, vanished, rng)
            output.write_iteration(iteration)
        if finished:
            output.write_end(iteration.number)
    return output.path


def _iteration(number, assign, poses, views, vanished, rng):
    n_classes, box = views.shape[:2]
    frequency = np.arange(box // 2 + 1) / (2 * (box // 2))
    classes = []
    for k, view in enumerate(views):
        members = np.flatnonzero(assign == k)
        if k in vanished:
            classes.append(ClassUpdate(view, members[:1], len(members)))
            continue
        cutoff = 0.3 - 0.15 * k / n_classes + 0.01 * number
        frc = np.stack([frequency, 1 / (1 + np.exp((frequency - cutoff) / 0.03)), 1 + 10 * frequency * box], axis=1)
        classes.append(ClassUpdate(view, members, len(members), frc, TanhFilter(cutoff, 0.2), np.zeros(2),
                                   like=n_classes - 1 if k == 0 else 0, likeness=0.5, detail=1.0, detail_error=0.05))
    changed = np.full(len(assign), True) if number == 0 else rng.random(len(assign)) < 0.03
    return Iteration(number, assign.astype(np.int32), poses, rng.uniform(1, 2, len(assign)), changed, classes,
                     1.0 + 0.1 * number, 1.0, random=None, stage=0, begun=0, stopped=False)
