"""Whether the particles of one class differ by more than noise: parallel analysis of their principal components.

Particles that show one view differ by noise alone once they are aligned; of two views, some component has more of the
variance. How much it has by noise is seen in copies of the particles: the average is taken out of each, and the
residual, moved in the pose of another particle, keeps its noise but no detail that stands still.

After J. L. Horn, A rationale and test for the number of factors in factor analysis, Psychometrika 30, 179-185 (1965).
Arrays in, arrays out: this module knows no file and no rank.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

from mrefali import average, fourier, geometry
from mrefali.contrast import align_to_averages, centered_average

#: Principal components that are looked at.
COMPONENTS = 3

#: Copies that a group is held against; of the first one more, which tell by how much the variances of noise vary.
COPIES, FIRST_COPIES = 5, 25

#: Standard errors beyond the copies' from which a component is more than noise.
SURE = 3.0

#: A group of fewer particles has no structure that could be told, and no part of one may be smaller than the second.
SMALLEST_GROUP, SMALLEST_PART = 16, 4

#: Of a larger group evenly spaced members are asked; images of float32 that each of these takes. Measured.
LARGEST_GROUP, IMAGES_A_MEMBER = 1000, 9

#: Share of the particles that two groups have in common if what is known of one holds for the other.
SAME_GROUP = 0.95

#: Particles are compared when filtered as averages of so many.
COUNT = 12

#: By how many px the search is wider here. A particle that lies beyond the search stands askew, and so differs.
BEYOND = 2.0


@dataclass(frozen=True, eq=False)
class Structure:
    """What is known of a group of particles.

    Attributes
    ----------
    members : (n,) int
    poses : (n,) geometry.POSE
        Carry the particles onto their average.
    excess : (COMPONENTS,) float64
        By how many standard errors a component has more of the variance than in the copies.
    along : (n, COMPONENTS) float64
        Coordinates of the particles.
    """

    members: np.ndarray
    poses: np.ndarray
    excess: np.ndarray
    along: np.ndarray

    @property
    def parts(self):
        """0 or 1 for each particle: the group cut across the component of the largest excess."""
        return cut(self.along[:, self.excess.argmax()])

    def tells(self, part):
        """How surely the components that are more than noise tell a ``part``, (n,) bool, from the rest.

        In standard errors: of the component, or of the correlation of particles along these with their part, whichever
        is less. ``SURE`` and less where no component is more than noise; 0 for a part that is none or all.
        """
        sure = self.excess > SURE
        if part.all() or not part.any():
            return 0.0
        if not sure.any():
            return self.excess.max()
        axes, label = self.along[:, sure] - self.along[:, sure].mean(axis=0), part - part.mean()
        share = ((axes.T @ label)**2 / (axes**2).sum(axis=0)).sum() / (label @ label)
        return min(self.excess.max(), np.sqrt(share * len(label)))


def bytes_needed(n_particles, box):
    """Memory that the structure of a group of ``n_particles`` at most takes."""
    return IMAGES_A_MEMBER * 4 * min(n_particles, LARGEST_GROUP) * box**2


class Structures:
    """The structure of groups of particles, each found once.

    Parameters
    ----------
    images : (n_particles, n, n) float32
    contrast : contrast.Contrast
    search : search.Search
    rng : numpy.random.Generator
    """

    def __init__(self, images, contrast, search, rng):
        self.images, self.contrast, self.rng = images, contrast, rng
        wide = search.xr + BEYOND
        radius = min(search.outer_radius, geometry.largest_outer_radius(search.box) - int(np.ceil(wide)))
        self.search = replace(search, outer_radius=max(1, radius), xr=wide, yr=wide)
        self._known, self._squares, self._freedom = [], 0.0, 0

    def of(self, members, average_of_them, count):
        """``Structure`` of ``members``, begun from an average, (n, n), of ``count``; or that of nearly the same group.

        None where there are too few.
        """
        if len(members) < SMALLEST_GROUP:
            return None
        members = members[::-(-len(members) // LARGEST_GROUP)]
        known = next((one for one in self._known if _are_same(members, one.members)), None)
        if known is None:
            known = self._found(members, average_of_them, count)
            self._known.append(known)
        return known

    def _found(self, members, average_of_them, count):
        images, averages, counts = self.images[members], average_of_them[None], np.array([count])
        for _ in range(3):
            poses = align_to_averages(images, averages, counts, self.contrast, self.search).poses
            averages = centered_average(average.transform(images, poses), poses)[None]
            counts = np.array([len(members)])
        images = self.contrast.filtered(images, COUNT)
        moved = fourier.transform(images, poses)
        seen = np.broadcast_to(moved.mean(axis=0), images.shape)
        residual = images - fourier.transform(seen, geometry.invert(poses))
        n_copies = COPIES if self._known else FIRST_COPIES
        copies = (fourier.transform(residual, self.rng.permutation(poses)) for _ in range(n_copies))
        of_copies = np.array([principal_components(copy[:, self.contrast.disc])[0] for copy in copies])
        values, along = principal_components(moved[:, self.contrast.disc])
        mean = of_copies.mean(axis=0)
        # relative to their mean they vary by much the same in all groups, and a few copies tell it badly
        self._squares += ((of_copies / mean - 1)**2).sum(axis=0)
        self._freedom += n_copies - 1
        error = np.sqrt(self._squares / self._freedom * (1 + 1 / n_copies))
        return Structure(members, poses, (values / mean - 1) / error, along)


def _are_same(members, others):
    return len(np.intersect1d(members, others)) >= SAME_GROUP * max(len(members), len(others))


def principal_components(pixels):
    """The first ``COMPONENTS`` principal components of particles, but for some that stand alone.

    A component that sets fewer than ``SMALLEST_PART`` particles apart is theirs: it is found anew without them. They
    have the coordinates of the outermost of the others.

    Parameters
    ----------
    pixels : (n, n_pixels)

    Returns
    -------
    values : (COMPONENTS,) float64
        Variances, relative to the mean of all components that are not 0.
    along : (n, COMPONENTS) float64
    """
    pixels = pixels.astype(np.float64)
    inside = np.arange(len(pixels))
    while True:
        middle = pixels[inside].mean(axis=0)
        rest = pixels[inside] - middle
        few = len(rest) <= rest.shape[1]
        products = rest @ rest.T if few else rest.T @ rest
        n = len(products)
        values, vectors = scipy.linalg.eigh(products, subset_by_index=[n - COMPONENTS, n - 1])
        axes = (rest.T @ vectors if few else vectors)[:, ::-1]
        along = (pixels - middle) @ (axes / np.linalg.norm(axes, axis=0))
        alone = np.zeros(len(inside), bool)
        for part in (cut(one) for one in along[inside].T):
            smaller = part == (part.mean() < 0.5)
            alone |= smaller & (smaller.sum() < SMALLEST_PART)
        if not alone.any() or len(inside) - alone.sum() < 2 * SMALLEST_PART:
            break
        inside = inside[~alone]
    return values[::-1] / np.trace(products) * n, np.clip(along, along[inside].min(axis=0), along[inside].max(axis=0))


def cut(values):
    """0 or 1 for each value: the cut into lower and higher ones that leaves the least variance within."""
    order = np.argsort(values, kind="stable")
    n, below = len(values), np.cumsum((values - values.mean())[order])[:-1]
    size = np.arange(1, n)
    part = np.zeros(n, np.int64)
    part[order[(below**2 * (1 / size + 1 / (n - size))).argmax() + 1:]] = 1
    return part
