"""What one iteration does with particles: the grid search, the refinement of what it finds, or that alone.

Arrays in, arrays out: this module knows no file and no rank.
"""

import numpy as np

from mrefali import average, geometry
from mrefali.assignment import LIMITED
from mrefali.likelihood import Likeliest
from mrefali.search import Alignments, align, align_to, peaks_of_each, ring_spectra
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
    counts : (n_references,) int64, optional
        Particles of which the references are averages, where particles go to the likeliest class.
    """

    def __init__(self, references, settings, number, counts=None):
        self._settings, self.n_references = settings, len(references)
        within = geometry.disc(settings.search.box, settings.search.outer_radius)
        references = average.normalize_references(settings.band.filtered(references, number, within), settings.inside)
        self._spectra = self._likeliest = None
        if settings.assignment == "likeliest":
            filtered = settings.contrast.references(references, counts)
            self._likeliest = Likeliest(filtered, settings.search, settings.subpixel)
        if settings.normalize_references:
            average.normalize_particles(references, settings.inside)
        if not settings.local and self._likeliest is None:
            self._spectra = ring_spectra(references, settings.search)
        self._splines = splines(references) if settings.local or settings.subpixel else None

    def __call__(self, images, poses, assign):
        """``search.Alignments`` of (n_particles, n, n) float32.

        ``assign``, (n_particles,) int32, are the classes where particles choose none; where they go to the likeliest
        those whose averages they are in, -1 for none.
        """
        search = self._settings.search
        if self._settings.local:
            found = Alignments(assign.copy(), poses, np.zeros(len(images)))
        elif self._likeliest is not None:
            found = self._likeliest(images, poses, assign)
        elif self._settings.assignment in LIMITED:
            found = align_to(images, poses, assign, self._spectra, search)
        else:
            found = align(images, poses, self._spectra, search)
        return found if self._splines is None else sharpen(images, found, self._splines, search)

    def peaks(self, images, poses):
        """How high each particle correlates with each reference, (n_particles, n_references) float32."""
        return peaks_of_each(images, poses, self._spectra, self._settings.search)
