"""What one iteration does with particles: the grid search, the refinement of what it finds, or that alone.

Arrays in, arrays out: this module knows no file and no rank. Imports average, geometry, search and sharpening only.
"""

import numpy as np

from mrefali import average, geometry
from mrefali.search import Alignments, align, ring_spectra
from mrefali.sharpening import sharpen, splines


class Aligner:
    """References, prepared; called, it aligns particles to them.

    Parameters
    ----------
    references : (n_references, n, n) float32
    settings : refine.Settings
        Of one stage.
    number : int
        Of the iteration, on which the band depends.
    """

    def __init__(self, references, settings, number):
        self._settings = settings
        within = geometry.disc(settings.search.box, settings.search.outer_radius)
        references = average.normalize_references(settings.band.filtered(references, number, within), settings.inside)
        if settings.normalize_references:
            average.normalize_particles(references, settings.inside)
        self._spectra = None if settings.local else ring_spectra(references, settings.search)
        self._splines = splines(references) if settings.local or settings.subpixel else None

    def __call__(self, images, poses, assign):
        """``search.Alignments`` of (n_particles, n, n) float32; ``assign`` is used by a local refinement only."""
        search = self._settings.search
        if self._settings.local:
            found = Alignments(assign.copy(), poses, np.zeros(len(images)))
        else:
            found = align(images, poses, self._spectra, search)
        return found if self._splines is None else sharpen(images, found, self._splines, search)
