"""Classes of limited size: the particles' classes by how well they fit all references, together.

Arrays in, arrays out: this module knows no file and no rank. Imports kernels only.
"""

import numpy as np

from mrefali.compiled import kernels

#: Ways to give all particles their classes together: so that no class is too large, or all of one size.
LIMITED = ("capped", "equal")

#: How a particle gets its class: the reference it correlates best with, see :mod:`mrefali.likelihood`, or as above.
ASSIGNMENTS = ("best", "likeliest", *LIMITED)

#: How often its equal share a class has at most, ``capped``: the largest of eight views whose sizes are as 20 to 1 has
#: 2.96 times its share.
CAP = 3

#: Scores are rounded to such a share of a power of two above the largest, so that sums of them are exact.
RESOLUTION = 2.0**-30

#: Bounds of the number of particles in a queue of ``kernels.Moves``, in between an eighth of the equal share.
SHORTEST_QUEUE, LONGEST_QUEUE = 8, 256


def size_limits(assignment, n_particles, n_classes):
    """Fewest and most particles that a class may have.

    Parameters
    ----------
    assignment : str
        ``capped`` or ``equal``.
    n_particles, n_classes : int
    """
    if assignment == "equal":
        return n_particles // n_classes, -(-n_particles // n_classes)
    return 0, -(-CAP * n_particles // n_classes)


def assign_within_limits(scores, assignment):
    """Class of each particle, (n_particles,) int32: of all of allowed sizes those whose scores have the largest sum.

    Successive shortest paths; see Ahuja, Magnanti and Orlin, Network Flows (1993), section 9.7. Each particle that does
    not get its best class takes a step, of a time that grows with the square of the number of classes. scipy's linear
    programs find the same, but 20,000 particles and 8 classes take them 1.8 s, and this 0.01 s.

    Parameters
    ----------
    scores : (n_particles, n_classes) float32
    assignment : str
        See :func:`size_limits`. Of equal scores the later class is the better one, as in the search.
    """
    n_particles, n_classes = scores.shape
    fewest, most = size_limits(assignment, n_particles, n_classes)
    assign = _best(scores)
    exponent = np.frexp(max(scores.max(), -scores.min()))[1]
    length = min(max(n_particles // (8 * n_classes), SHORTEST_QUEUE), LONGEST_QUEUE)
    kernels.assign_within(scores, fewest, most, np.float64(2.0**-exponent / RESOLUTION), length, assign)
    return assign


def _best(scores):
    """The class of the highest score of each particle, of equal ones the last."""
    assign, highest = np.zeros(len(scores), np.int32), scores[:, 0].copy()
    for k in range(1, scores.shape[1]):  # reversed for argmax, all scores would be copied
        better = scores[:, k] >= highest
        assign[better] = k
        np.maximum(highest, scores[:, k], out=highest)
    return assign
