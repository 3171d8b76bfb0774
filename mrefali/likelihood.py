"""Particles to their most probable class, and their poses in it.

Three things count beside how well a particle fits an average. Its own part in that average is taken out, or a small
class would hold what it has. A larger class is as much more likely, or two classes of one view would share its
particles for ever, whatever else one of them has. And the pose is refined in the likeliest few classes before one is
chosen: a shift that is off by half a pixel costs more than there is between views that are alike.

Arrays in, arrays out: this module knows no file and no rank.
"""

import numpy as np

from mrefali import geometry
from mrefali.search import Alignments, align_each, ring_spectra
from mrefali.sharpening import sharpen, splines

#: Likeliest classes of a particle for which its pose is refined before one is chosen. Of these none is left out because
#: the search has it far behind: at high SNR half a pixel puts the right one there.
REFINED = 3

#: Pairs of particle and class of which the poses are held at a time.
PAIRS_AT_ONCE = 1 << 16

#: Memory that a pair takes, and a pixel of an average, filtered and prepared. Measured.
PAIR_BYTES, PIXEL_BYTES = 240, 48


def bytes_needed(n_classes, box):
    """Memory that :class:`Likeliest` takes beside the particles, the filtered averages included."""
    return PIXEL_BYTES * n_classes * box**2 + PAIR_BYTES * max(PAIRS_AT_ONCE, n_classes)


class Likeliest:
    """Classes, prepared; called, it sends particles to them.

    Parameters
    ----------
    references : contrast.References
    search : search.Search
    refine : bool
        Whether poses are refined continuously.
    """

    def __init__(self, references, search, refine=True):
        self._references, self._search = references, search
        self._spectra = ring_spectra(references.images, search)
        self._splines = splines(references.images) if refine else None

    def __call__(self, images, poses, part_of):
        """Class and pose of each particle.

        Parameters
        ----------
        images : (n_particles, n, n) float32
            Normalised.
        poses : (n_particles,) geometry.POSE
            Where the search starts.
        part_of : (n_particles,) int32
            The class whose average a particle is in; -1 if in none.

        Returns
        -------
        Alignments
            Of equally likely classes that of the higher grid score, then the first. Peaks are with the filtered
            averages, the particle's part included.
        """
        n, at_once = len(images), max(1, PAIRS_AT_ONCE // len(self._references.counts))
        found = Alignments(np.empty(n, np.int32), np.empty(n, geometry.POSE), np.empty(n))
        for first in range(0, n, at_once):
            some = slice(first, first + at_once)
            sent, _ = self.with_scores(images[some], poses[some], part_of[some])
            found.assign[some], found.poses[some], found.peak[some] = sent.assign, sent.poses, sent.peak
        return found

    def with_scores(self, images, poses, part_of):
        """The same of few particles, and how they fit all classes.

        Returns
        -------
        Alignments
        scores : (n_particles, n_classes) float64
            :meth:`contrast.References.fair` ones of the grid search.
        """
        references, i = self._references, np.arange(len(images))
        each = align_each(images, poses, self._spectra, self._search)
        every = np.arange(len(each.peak))[:, None]
        scores = references.fair(each.peak, every, part_of)
        ranked = np.argsort(-scores - references.prior(every, part_of), axis=0, kind="stable")
        likely = ranked[:REFINED].astype(np.int32)
        candidates = [Alignments(k, each.poses[k, i], each.peak[k, i]) for k in likely]
        if self._splines is not None:
            candidates = [sharpen(images, found, self._splines, self._search) for found in candidates]
        peaks = np.stack([found.peak for found in candidates])
        best = (references.fair(peaks, likely, part_of) + references.prior(likely, part_of)).argmax(axis=0)
        return Alignments(likely[best, i], np.stack([found.poses for found in candidates])[best, i],
                          peaks[best, i]), scores.T
