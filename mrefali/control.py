"""The noise control (the command ``null``): what a run finds in noise that has the spectrum of its particles.

Files in, files out; says what a run will take as :mod:`mrefali.run` does. STACK is only read.
"""

import csv
import logging
import os
from contextlib import nullcontext

import numpy as np
import scipy.fft

from mrefali import parallel
from mrefali.checks import Options, check_new_directory, prepare, use_threads
from mrefali.errors import InputError
from mrefali.fourier import half_spectrum
from mrefali.io import open_stack
from mrefali.outdir import OutputDirectory, resolution_px
from mrefali.reference import fourier_shift
from mrefali.refine import refine
from mrefali.run import report_memory, report_range, report_time

logger = logging.getLogger(__name__)

#: Of particles and of noise, the latter with ``_noise`` behind the name.
FIGURES = ("count", "correlation", "peak", "resolution_0.5_px", "resolution_0.143_px")


class NoiseStack:
    """Gaussian noise with the mean power spectrum of a stack, by rings; headers and poses are the stack's.

    Noise image i depends on ``seed`` and i alone, and is made anew each time it is read.

    Parameters
    ----------
    stack
        See :mod:`mrefali.io`.
    seed : int
    comm
        See :mod:`mrefali.parallel`; the root alone takes the spectrum, whose bits another sharing would change.
    """

    def __init__(self, stack, seed, comm=parallel.SERIAL):
        self.stack, self.seed = stack, seed
        self.path, self.n_images, self.box, self.pixel_size_A = (
            f"noise like {stack.path}", stack.n_images, stack.box, stack.pixel_size_A)
        radius, self._times = half_spectrum(self.box)
        self._ring = np.rint(radius).astype(int)
        with comm.agreeing():
            power = self._mean_power() if comm.is_root else None
        self._amplitude = np.sqrt(comm.from_root(power))[self._ring].astype(np.float32)

    def _mean_power(self):
        """Power of a Fourier coefficient, in noise of variance 1 a pixel, by whole Fourier pixels; 0 for the mean."""
        counts, total = np.bincount(self._ring.ravel(), np.broadcast_to(self._times, self._ring.shape).ravel()), 0.0
        for first in range(0, self.n_images, 256):
            images = self.stack.read(first, min(first + 256, self.n_images))
            power = (np.abs(scipy.fft.rfft2(images)) ** 2).sum(axis=0, dtype=np.float64)
            total = total + np.bincount(self._ring.ravel(), (self._times * power).ravel())
        mean = total / counts / self.n_images / self.box**2
        mean[0] = 0.0  # normalisation takes the mean away
        return mean

    def read(self, start, stop):
        """Noise images ``start`` to ``stop``, (stop - start, n, n) float32."""
        return self.read_at(np.arange(start, stop))

    def read_at(self, indices):
        """The noise images of those indices, (n_indices, n, n) float32."""
        images = np.empty((len(indices), self.box, self.box), np.float32)
        for image, i in zip(images, indices, strict=True):  # at once, spectra would take several times the memory
            white = np.random.default_rng([self.seed, int(i)]).standard_normal(image.shape, np.float32)
            image[:] = scipy.fft.irfft2(scipy.fft.rfft2(white) * self._amplitude, s=image.shape)
        return images

    def poses(self):
        """Those of the stack, (n_images,) POSE."""
        return self.stack.poses()

    def ctf(self):
        """The CTFs of the stack, as its ``ctf`` gives them."""
        return self.stack.ctf()

    def values(self, name):
        """The header ``name`` of the stack's images, one after the other."""
        return self.stack.values(name)


def null(stack, refs, outdir, mask=None, *, ir=1, ou=-1, rs=1, xr=0.0, yr=0.0, ts=1.0, center=1, maxit=1, CTF=False,
         snr=1.0, function="ref_ali2d", rand_seed=1000, MPI=False, mirror=True, subpixel=False, vanished="random",
         center_limit=None, threads=0, quiet=False, check=False):
    """Align the particles of a stack, and noise that has their power spectrum, to the same references.

    OUTDIR gets ``particles/`` and ``noise/``, each what a run writes but for the headers, and ``null.csv``, one row an
    iteration and class: particles; correlation, under the mask, of the average with the reference that its particles
    were aligned to; mean peak; period in px at which the FRC of the two halves falls below 0.5 and 0.143. What the
    columns of the noise hold is there without any signal. The headers of STACK are left as they are.

    Parameters
    ----------
    stack, refs, outdir, mask, ir, ou, rs, xr, yr, ts, center, maxit, CTF, snr, function, rand_seed, MPI, mirror, \
subpixel, vanished, center_limit, threads, quiet, check
        As for :func:`mrefali.mref_ali2d`; ``rand_seed`` is the seed of the noise too, and the time estimated with
        ``check`` that of both.

    Returns
    -------
    list of dict or None
        The rows of ``null.csv``; None with ``check``, and under MPI on all ranks but the root.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
        Nothing was created then.
    """
    options = Options(mask=mask, ir=ir, ou=ou, rs=rs, xr=xr, yr=yr, ts=ts, center=center, maxit=maxit, CTF=CTF, snr=snr,
                      function=function, rand_seed=rand_seed, vanished=vanished, center_limit=center_limit, quiet=quiet,
                      mirror=mirror, subpixel=subpixel)
    comm = parallel.communicator(MPI)
    with comm.ending_together(), use_threads(threads, comm):
        with comm.agreeing():
            particles, references = open_stack(stack), open_stack(refs)
            if comm.is_root:
                check_new_directory(outdir)
            if not rand_seed >= 0:
                raise InputError(f"rand_seed={rand_seed} is not allowed: the noise needs a whole number of at least 0")
        plan = prepare(particles, references, options, comm)  # refuses bad pixels before they are averaged
        noise = prepare(NoiseStack(particles, rand_seed, comm), references, options, comm)
        if check:
            if comm.is_root:
                report_range(plan)
                report_memory(noise)
                report_time([plan, noise], comm)
            return None
        with comm.agreeing():
            if comm.is_root:
                os.mkdir(outdir)
        runs = [_run(p, os.path.join(outdir, name), comm) for name, p in (("particles", plan), ("noise", noise))]
        return _write_table(outdir, stack, *runs) if comm.is_root else None


def _run(plan, path, comm):
    """Of each iteration the figures of each class, after writing what a run writes; at the root."""
    core, references, figures = plan.settings.core, plan.references, []
    with OutputDirectory(path, plan.stack.pixel_size_A) if comm.is_root else nullcontext() as output:
        if comm.is_root:
            output.write_start(plan.assign, plan.poses)
        for iteration in refine(plan.particles, plan.references, plan.poses, plan.settings, comm):
            if comm.is_root:
                output.write_iteration(iteration)
                figures.append([_figures(c, k, iteration, references[k], core)
                                for k, c in enumerate(iteration.classes)])
                references = iteration.averages
        if comm.is_root:
            output.write_end(iteration.number)
    return figures


def _write_table(outdir, stack, of_particles, of_noise):
    """Write ``null.csv`` of what :func:`_run` found; its rows."""
    rows = [{"iteration": number, "class": k} | mine | {f"{name}_noise": value for name, value in its.items()}
            for number, iterations in enumerate(zip(of_particles, of_noise, strict=False))  # auto-stop ends one before
            for k, (mine, its) in enumerate(zip(*iterations, strict=True))]
    with open(os.path.join(outdir, "null.csv"), "x", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    logger.info("done: %s/null.csv; averages and FRC curves in %s/particles and %s/noise; %s is as it was", outdir,
                outdir, outdir, stack)
    return rows


def _figures(update, k, iteration, reference, core):
    """Count, correlation, mean peak and two resolutions of class ``k``; empty where it vanished."""
    if update.vanished:
        return dict(zip(FIGURES, (update.count, "", "", "", ""), strict=True))
    # the average stands where its centring moved it to, and so no longer on the reference
    back = fourier_shift(update.image, -np.asarray(update.shift)) if np.any(update.shift) else update.image
    correlation = float(np.corrcoef(back[core], reference[core])[0, 1])
    return dict(zip(FIGURES, (update.count, correlation, float(iteration.peak[iteration.assign == k].mean()),
                              resolution_px(update.frc, 0.5), resolution_px(update.frc, 0.143)), strict=True))
