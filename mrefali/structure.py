"""Whether the particles of one class differ by more than noise, and whether those of two classes are two kinds.

The first by parallel analysis of their principal components; the second also by how well they fit either average.

Particles that show one view differ by noise alone once they are aligned; of two views, some component has more of the
variance. How much it has by noise is seen in copies of the particles: the average is taken out of each, and the
residual, turned by an angle drawn at random, keeps its noise but no detail that stands still. Contrast does not count:
how strongly a particle shows the average varies with the ice, and is taken out. Nor does the CTF: of the average each
particle shows what its own has left.

After J. L. Horn, A rationale and test for the number of factors in factor analysis, Psychometrika 30, 179-185 (1965).
Arrays in, arrays out: this module knows no file and no rank.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.fft
import scipy.linalg
import scipy.stats

from mrefali import average, fourier, geometry
from mrefali.contrast import FITTED, centered_average
from mrefali.ctf import ctf_sq_at
from mrefali.search import align, align_each, ring_spectra
from mrefali.sharpening import sharpen, splines

#: Principal components that are looked at.
COMPONENTS = 3

#: Copies that a group is held against; of the first one more, which tell by how much the variances of noise vary.
COPIES, FIRST_COPIES = 6, 25

#: Standard errors beyond the copies' from which a component is more than noise: of the hundreds that are looked at in a
#: search for seeds none should be so by chance. Particles that are aligned wrongly differ too, see docs/classes.md.
SURE = 4.0

#: A group of fewer particles has no structure that could be told, since a correlation of n numbers is sqrt(n) errors at
#: most; no part of one may be smaller than the second.
SMALLEST_GROUP, SMALLEST_PART = int(SURE**2) + 1, 4

#: Of a larger group evenly spaced members are asked; images of float32 that each of these takes. Measured.
LARGEST_GROUP, IMAGES_A_MEMBER = 1000, 9

#: What is known of a group holds for another one that differs in less than this share of its smallest class.
OTHER_SHARE = 0.05

#: Particles are compared when filtered as averages of so many.
FILTER_COUNT = 12

#: By how many px the search is wider here, where this leaves so much of the radius to align by. A particle that lies
#: beyond the search stands askew, and so differs.
BEYOND, RADIUS_SHARE = 2.0, 0.75

#: Steps of the search: of a first one, as a share of the box, and in px of a second one about what that found.
COARSE_SHARE, FINE_STEP = 1 / 32, 1.0

#: The relative variance of a component of noise falls with this power of the number of particles. Measured, 16 to 1000.
POWER = 0.75


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
        if part.all() or not part.any():
            return 0.0
        sure = self.excess > SURE
        if not sure.any():
            return self.excess.max()
        axes, label = self.along[:, sure] - self.along[:, sure].mean(axis=0), part - part.mean()
        share = ((axes.T @ label)**2 / (axes**2).sum(axis=0)).sum() / (label @ label)
        return min(self.excess.max(), np.sqrt(share * len(label)))


def bytes_needed(n_particles, box):
    """Memory that the structure of a group of ``n_particles`` at most takes."""
    return IMAGES_A_MEMBER * 4 * min(n_particles, LARGEST_GROUP) * box**2 + fourier.work_bytes(box)


class Structures:
    """The structure of groups of particles, each found once.

    Copies are drawn from one generator, and by how much they vary is pooled over all groups: within noise, what a group
    is found to have depends on which were asked before.

    Parameters
    ----------
    images : (n_particles, n, n) float32
    contrast : contrast.Contrast
    search : search.Search
    rng : numpy.random.Generator
    ctf : (n_particles,) ctf.CTF_PARAMETERS, optional
        Of images that are multiplied by their CTF.
    """

    def __init__(self, images, contrast, search, rng, ctf=None):
        self.images, self.contrast, self.rng, self.ctf = images, contrast, rng, ctf
        room = geometry.largest_outer_radius(search.box) - int(np.ceil(RADIUS_SHARE * search.outer_radius))
        wide = max(search.xr, min(search.xr + BEYOND, float(room)))
        radius = min(search.outer_radius, geometry.largest_outer_radius(search.box) - int(np.ceil(wide)))
        self.search = replace(search, outer_radius=max(1, radius), xr=wide, yr=wide)
        step = max(FINE_STEP, float(int(COARSE_SHARE * search.box)))
        coarse = replace(self.search, shift_step=step)
        fine = replace(self.search, shift_step=FINE_STEP, xr=step - FINE_STEP, yr=step - FINE_STEP)
        self.fast = [coarse, fine] if step > FINE_STEP else [coarse]
        self._turns = turns(contrast.disc)
        self._known, self._squares, self._freedom = [], 0.0, 0

    def of(self, members, smallest, average_of_them, count):
        """``Structure`` of ``members``, begun from an average, (n, n), of ``count``; or that of nearly the same group.

        The smallest class in it has ``smallest`` members. None where there are too few, or where they are all alike.
        """
        if len(members) < SMALLEST_GROUP:
            return None
        for others, found in self._known:
            if len(np.setxor1d(members, others, assume_unique=True)) <= OTHER_SHARE * smallest:
                return found
        found = self._found(members[::-(-len(members) // LARGEST_GROUP)], average_of_them, count)
        self._known.append((members, found))
        return found

    def told_by_fit(self, groups, averages, counts, part_of):
        """How surely two groups of particles show two views, in standard errors.

        By how much better each particle fits the one average than the other: of one view this is what noise makes of
        it, and two classes are its larger and its smaller values. Each is aligned within the wider search, since one
        beyond the search fits that average better which stands on its side. Its own part is taken out, and nothing
        given for its pose that this held, so that of one view the groups lie closer than the parts of what was cut.

        Parameters
        ----------
        groups : (n,), (m,) int
            Particles of each.
        averages : (2, n, n) float32
        counts : (2,) int
        part_of : (n_particles,) int
            0 or 1, the average that a particle is in; -1 if in neither.
        """
        members, references = np.concatenate(groups), self.contrast.references(averages, counts)
        spectra = ring_spectra(references.images, self.search)
        peaks = align_each(self.images[members], geometry.identity_poses(len(members)), spectra, self.search).peak
        every, part_of = np.arange(2)[:, None], part_of[members]
        first, second = references.fair(peaks, every, part_of) - FITTED * references.unit * (every == part_of)
        return gap(*np.split(first - second, [len(groups[0])]))

    def _found(self, members, average_of_them, count):
        images, disc = self.images[members], self.contrast.disc
        poses = self._aligned(images, average_of_them, count, self.fast)
        for searches in (self.fast, [self.search]):
            centered = centered_average(average.transform(images, poses), poses)
            poses = self._aligned(images, centered, len(members), searches)
        moved = fourier.transform(self.contrast.filtered(images, FILTER_COUNT), poses)
        basis = np.stack([np.ones(disc.shape, np.float32), moved.mean(axis=0)])
        common = np.linalg.qr(basis[:, disc].T.astype(np.float64))[0]
        if self.ctf is not None:
            self._take_out_shown(moved, basis[1], self.ctf[members])
        values, along = principal_components(moved[:, disc], common)
        # what strength and level differ by would be turned with the residuals, and no more be common
        amounts = np.linalg.lstsq(basis[:, disc].T, moved[:, disc].T)[0]
        moved -= np.tensordot(amounts.T, basis, 1)
        angles = self.rng.uniform(0, 360, len(moved))
        residual = fourier.transform(moved, geometry.make_poses(angles, 0.0, 0.0))[:, disc]
        n_copies = COPIES if self._freedom else FIRST_COPIES
        of_copies = np.array([principal_components(self._turned(residual), common)[0] for _ in range(n_copies)])
        if not (np.isfinite(of_copies).all() and np.isfinite(along).all()):
            return None
        usual = of_copies.mean(axis=0)
        # a few copies tell badly by how much they vary, so those of all groups do
        self._squares += ((of_copies / usual - 1)**2).sum(axis=0) * len(members)**POWER
        self._freedom += n_copies - 1
        error = np.sqrt(self._squares / self._freedom / len(members)**POWER * (1 + 1 / n_copies))
        return Structure(members, poses, (values / usual - 1) / error, along)

    def _take_out_shown(self, moved, average_of_them, ctf):
        """Take out of each particle, in place, what its CTF has left of the average, as strongly as shown, and a level.

        At the exact frequency of each coefficient: from one Fourier pixel to the next a CTF may change its sign.
        """
        disc, n = self.contrast.disc, len(average_of_them)
        radius, _ = fourier.half_spectrum(n)
        mean = sum(ctf_sq_at(one, radius, n) for one in ctf) / len(ctf)
        spectrum = scipy.fft.rfft2(average_of_them) / np.maximum(mean, np.finfo(np.float32).tiny)
        pair = np.ones((2, n, n))
        for image, one in zip(moved, ctf, strict=True):
            pair[1] = scipy.fft.irfft2(spectrum * ctf_sq_at(one, radius, n), s=image.shape)
            image -= np.tensordot(np.linalg.lstsq(pair[:, disc].T, image[disc])[0], pair, 1)

    def _aligned(self, images, average_of_them, count, searches):
        """Continuous poses after searches one after the other, each about what the last one found."""
        reference = self.contrast.references(average_of_them[None], np.array([count])).images
        spectra, poses = ring_spectra(reference, self.search), geometry.identity_poses(len(images))
        for search in searches:
            found = align(images, poses, spectra, search)
            poses = found.poses
        return sharpen(images, found, splines(reference), self.search).poses

    def _turned(self, pixels):
        """Each row turned by right angles and mirrored, as is drawn: moving pixels costs less than interpolation."""
        drawn = self._turns[self.rng.integers(len(self._turns), size=len(pixels))]
        return np.take_along_axis(pixels, drawn, axis=1)


def cut_apart(share):
    """How far apart the parts of one normal distribution lie that is cut so that one is a ``share``.

    In deviations, that within the parts: 2.65 for halves, less for other parts but for those below 1.8 %.
    """
    between = scipy.stats.norm.pdf(scipy.stats.norm.ppf(share))**2 / (share * (1 - share))
    return np.sqrt(between / (share * (1 - share)) / (1 - between))


def gap(these, those):
    """How surely numbers in two parts are more than one normal distribution that was cut in two.

    Parameters
    ----------
    these, those : (n,), (m,) float64
        Three at least in all.

    Returns
    -------
    float
        By how many standard errors ``these`` are further above ``those`` than the parts of one would be, see
        :func:`cut_apart`; minus infinity where a number is infinite, or those of each part are the same.
    """
    n, m = len(these), len(those)
    if not (np.isfinite(these).all() and np.isfinite(those).all()):
        return -np.inf
    within = np.sqrt((n * these.var() + m * those.var()) / (n + m - 2))
    if within == 0:
        return -np.inf
    apart = (these.mean() - those.mean()) / within
    return (apart - cut_apart(n / (n + m))) / np.sqrt(1 / n + 1 / m + apart**2 / (2 * (n + m - 2)))


def turns(disc):
    """The eight ways to turn pixels within a ``disc``, (n, n) bool, by right angles about its centre, and mirror them.

    Returns
    -------
    (8, disc.sum()) int
        Which pixel comes to stand at each.
    """
    number = np.full(disc.shape, -1)
    number[disc] = np.arange(disc.sum())
    centred = number[1 - len(disc) % 2:, 1 - len(disc) % 2:]  # the first row and column of an even box have no other
    inside = centred >= 0
    return np.stack([np.rot90(ways, quarters)[inside] for ways in (centred, centred[::-1]) for quarters in range(4)])


def principal_components(pixels, common):
    """The first ``COMPONENTS`` principal components of particles, but for some that stand alone.

    A component that sets fewer than ``SMALLEST_PART`` particles apart is theirs: it is found anew without them. They
    have the coordinates of the outermost of the others.

    Parameters
    ----------
    pixels : (n, n_pixels)
    common : (n_pixels, n_common)
        Orthonormal directions in which particles may differ without being another view; they are taken out.

    Returns
    -------
    values : (COMPONENTS,) float64
        Variances, relative to the mean of all as many as there are particles or pixels, whichever are fewer.
    along : (n, COMPONENTS) float64
    """
    pixels = pixels.astype(np.float64)
    pixels -= pixels @ common @ common.T
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
