"""Poses refined continuously, in shift and angle, against the reference that each particle has.

Arrays in, arrays out: this module knows no file and no rank. Imports geometry, kernels and search's dataclasses only.
"""

import dataclasses

import numpy as np
from scipy.ndimage import spline_filter

from mrefali import geometry
from mrefali.compiled import kernels

#: A refined pose moves no pixel of the disc farther than this by its shift, nor by its angle, in px.
FARTHEST_PX = 2.0

#: Width in px of the frame round a reference: what refined poses may reach beyond the disc, and the spline itself.
MARGIN = 8


def splines(references):
    """Coefficients of the cubic splines through references.

    Parameters
    ----------
    references : (n_references, n, n) float32

    Returns
    -------
    (n_references, (n + 2 * MARGIN)**2) float32
    """
    framed = np.pad(references, [(0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)], mode="edge")
    return np.stack([spline_filter(image, order=3, output=np.float64).astype(np.float32).ravel() for image in framed])


def spline_bytes(n_references, box):
    """Memory that :func:`splines` takes at its peak: the framed references, their coefficients, and all in one."""
    return 3 * 4 * n_references * (box + 2 * MARGIN)**2


def sharpen(images, found, coefficients, search):
    """Poses at which particles correlate best with their references, about the poses they have.

    The particle is held against the reference as a cubic spline, times a height and plus a constant, over its own
    pixels within ``search``'s rings; with white noise that is maximum likelihood. Class and mirror stay.

    Parameters
    ----------
    images : (n_particles, n, n) float32
    found : search.Alignments
    coefficients : (n_references, ...) float32
        See :func:`splines`.
    search : search.Search
        Its inner and outer radius.

    Returns
    -------
    search.Alignments
        With peaks as the search's, but of the refined poses, before a last step of less than ``kernels.SETTLED_PX``.
    """
    matrices = geometry.to_matrices(found.poses)
    plane = np.ascontiguousarray(matrices[:, :2, [0, 1, 3]])
    peak = np.empty(len(images))
    # a ring stands for half a pixel to either side
    kernels.sharpen(images, plane, found.assign, search.inner_radius - 0.5, float(search.outer_radius), FARTHEST_PX,
                    coefficients, MARGIN, peak)
    matrices[:, :2, [0, 1, 3]] = plane
    return dataclasses.replace(found, poses=geometry.from_matrices(matrices), peak=peak / search.ring_step)
