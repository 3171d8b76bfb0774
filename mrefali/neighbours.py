"""Averages of particles that are alike: where classes begin.

Arrays in, arrays out: this module knows no file and no rank.
"""

from dataclasses import dataclass, replace

import numpy as np

from mrefali import average, geometry
from mrefali.contrast import References, centered_average
from mrefali.search import Alignments, align_each, ring_spectra

#: Neighbours that are averaged, round by round; step of their search in px, coarse for speed.
NEIGHBOURS, STEP = (8, 12), 2.0


@dataclass(frozen=True)
class Neighbourhoods:
    """Averages, the particles in each, and how all particles are aligned to them.

    Attributes
    ----------
    averages : (n_averages, n, n) float32
        Centred.
    members : (n_averages, n_neighbours) int
    member_poses : (n_averages, n_neighbours) geometry.POSE
        Carry the members onto the average.
    references : contrast.References
        Of the averages.
    found : search.Alignments
        Each particle to each average, (n_averages, n_particles).
    """

    averages: np.ndarray
    members: np.ndarray
    member_poses: np.ndarray
    references: References
    found: Alignments

    def scores(self):
        """How well particles fit, as if none had a part in an average, (n_particles, n_averages) float64."""
        scores = self.found.peak.astype(np.float64)
        for k, members in enumerate(self.members):
            mine = np.full(len(members), k)
            scores[k, members] = self.references.fair(scores[k, members], mine, mine)
        return scores.T


def coarse_search(search):
    """The ``Search`` for neighbours."""
    return replace(search, shift_step=min(STEP, max(1.0, search.xr)))


def neighbourhoods(images, drawn, contrast, search):
    """``Neighbourhoods`` about particles.

    Each is a reference for all; it gives way to the average of those that are most like it, round by round.

    Parameters
    ----------
    images : (n_particles, n, n) float32
    drawn : (n_averages,) int
    contrast : contrast.Contrast
    search : search.Search
    """
    averages, n_averaged = images[drawn], 1
    for n_neighbours in NEIGHBOURS:
        _, found = _aligned(images, averages, n_averaged, contrast, search)
        members = np.argsort(-found.peak, axis=1, kind="stable")[:, :n_neighbours]
        poses = np.take_along_axis(found.poses, members, axis=1)
        averages = np.stack([centered_average(average.transform(images[some], pose), pose)
                             for some, pose in zip(members, poses, strict=True)])
        n_averaged = members.shape[1]
    return Neighbourhoods(averages, members, poses, *_aligned(images, averages, n_averaged, contrast, search))


def _aligned(images, averages, n_averaged, contrast, search):
    """``References`` of averages of so many particles, and ``Alignments`` of each particle to each of them."""
    references, coarse = contrast.references(averages, np.full(len(averages), n_averaged)), coarse_search(search)
    starts = geometry.identity_poses(len(images))
    return references, align_each(images, starts, ring_spectra(references.images, coarse), coarse)


def choose(scores, so_far, n):
    """Averages that fit all particles best together with what there is so far, ``n`` of them one after the other.

    Parameters
    ----------
    scores : (n_particles, n_averages)
    so_far : (n_particles,)
        How well each fits what there is.

    Returns
    -------
    list of int
    """
    chosen, best = [], so_far
    for _ in range(n):
        total = np.maximum(scores, best[:, None]).sum(axis=0)
        total[chosen] = -np.inf
        chosen.append(int(total.argmax()))
        best = np.maximum(best, scores[:, chosen[-1]])
    return chosen
