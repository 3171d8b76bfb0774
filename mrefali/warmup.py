"""Everything compiled before it is needed, and once. Imports the method's modules; runs no file's pixels."""

import logging
import threading

import numpy as np

from mrefali import average, fourier, geometry
from mrefali.assignment import LIMITED, assign_within_limits
from mrefali.search import Search, align, peaks_of_each, ring_spectra
from mrefali.sharpening import sharpen, splines

logger = logging.getLogger(__name__)

#: What takes longer, in seconds, is being compiled.
COMPILING_S = 3.0


def compile_kernels(comm, assignment="best"):
    """Compile, or load, all that a run calls.

    The root goes first and fills the cache. Then one rank of each other machine goes, whose cache may be another. The
    rest find what they need when they need it.

    Parameters
    ----------
    comm
        See :mod:`mrefali.parallel`.
    assignment : str
        See ``assignment.ASSIGNMENTS``.
    """
    leads = comm.leads_machine()
    for mine in (comm.is_root, leads and not comm.is_root):
        if mine:
            notice = threading.Timer(COMPILING_S, logger.info if comm.is_root else logger.debug, [
                "compiling the search, once an installation: it takes about half a minute"])
            notice.start()
            try:
                _run_all()
                if assignment != "best":
                    peaks = _peaks()
                if assignment in LIMITED:
                    assign_within_limits(peaks, assignment)
            finally:
                notice.cancel()
        comm.barrier()


def _run_all():
    """A whole iteration on two tiny images; of the same types, though not sizes, as that of any run."""
    images, references, search = _tiny()
    found = align(images, geometry.identity_poses(2), ring_spectra(references, search), search)
    found = sharpen(images, found, splines(references), search)
    average.ClassSums(2, 16, 2, 100.0).add(images, found.poses, found.assign, np.arange(2))
    fourier.transform(images, geometry.make_poses([30.0, 60.0]))


def _peaks():
    """How the same two correlate with each of them, (2, 2) float32."""
    images, references, search = _tiny()
    return peaks_of_each(images, geometry.identity_poses(2), ring_spectra(references, search), search)


def _tiny():
    """Two images, normalised, as particles and as references, and a search of them."""
    search, inside = Search(16, 1, 4, 1, 0.0, 0.0, 1.0), geometry.disc(16, 4)
    images = np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32)
    references = average.normalize_references(images, inside)
    average.normalize_particles(images, inside)
    return images, references, search
