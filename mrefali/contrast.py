"""What of particles is signal by their spectra, and averages filtered for what tells views apart.

Arrays in, arrays out: this module knows no file and no rank.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft

from mrefali import geometry
from mrefali.errors import InputError
from mrefali.fourier import half_spectrum
from mrefali.reference import fourier_shift

#: Width in px of the soft edge within which images are compared.
EDGE = 3.0

#: Of the product of a particle with itself, what is in its score against an average of which it is part. Both are
#: smoothed on the way: it was 0.62 to 0.78 of simulated particles of 32 and 64 px.
OWN_SHARE = 0.7


class Contrast:
    """What of the particles is signal, ring by ring of Fourier space, and averages filtered for it.

    The noise is that of the corners, beyond the soft edge, or else that of high frequencies; what the disc has beyond
    it is signal. With S their ratio an average of m particles is multiplied by S / ((1 + S) (S + 1/m)): by
    S / (S + 1/m) for its noise, and divided by 1 + S since all views have much in common where S is large, at low
    frequencies. The last ring counts for nothing.

    Parameters
    ----------
    images : (n_particles, n, n) float32
    radius : float, px
    """

    def __init__(self, images, radius):
        n = images.shape[1]
        y, x = np.indices((n, n)) - n // 2
        self.edge = np.clip((radius + EDGE - np.hypot(x, y)) / EDGE, 0, 1).astype(np.float32)
        self.disc = geometry.disc(n, radius)
        frequency, self._times = half_spectrum(n)
        self._ring = np.minimum(np.rint(frequency).astype(int), n // 2)
        outside = 1 - self.edge
        power = self._ring_power(images, self.edge) / (self.edge**2).sum()
        level = np.tensordot(images, outside, 2) / outside.sum()
        corners = (image - its_level for image, its_level in zip(images, level, strict=True))
        noise = self._ring_power(corners, outside) / (outside**2).sum()
        # where the corners are masked, or are of another kind, the noise is what is left at high frequencies
        highest = slice(3 * n // 8, None)
        if not 0.5 < noise[highest].mean() / power[highest].mean() < 2:
            noise = np.full(len(power), power[highest].mean())
        noise = np.maximum(noise, np.finfo(np.float32).eps * noise.max())  # where the particles were filtered, 0
        self.ratio = np.maximum(power / noise - 1, 0)
        self.ratio[-1] = 0  # the last ring has the corners of Fourier space in it, which a turned image has lost
        if not (self.ratio[1:] > 0).any():
            raise InputError(f"the particles have nothing within radius ou={radius} that they have not outside it, or "
                             "at high frequencies: they seem to be noise alone")
        self.ratio[0] = self.ratio[1]  # the mean of a particle says nothing
        self._level = noise[self._ring]
        # what a coefficient of a filtered particle adds to its product with itself over the disc
        own = self._ring_power(images, self.edge, self.edge * self.disc)
        self._own = OWN_SHARE * own[self._ring] * self._times

    def _ring_power(self, images, weight, other=None):
        """Mean product of a Fourier coefficient of images weighted in two ways, or in one, in each ring."""
        power, n_images = np.zeros(self._ring.shape), 0
        for image in images:  # spectra of all together would be several copies of them
            first = scipy.fft.rfft2(image * weight)
            second = first if other is None else scipy.fft.rfft2(image * other)
            power += (first.conj() * second).real
            n_images += 1
        return np.bincount(self._ring.ravel(), power.ravel()) / np.bincount(self._ring.ravel()) / n_images

    def filter(self, count):
        """Factors of the half spectrum of an average of so many particles."""
        s = self.ratio[self._ring]
        return s / ((1 + s) * (s + 1 / count))

    def filtered(self, images, count):
        """Images filtered as averages of ``count``, whole, (n_images, n, n) float32."""
        factors, filtered = self.filter(count), np.empty(images.shape, np.float32)
        for image, result in zip(images, filtered, strict=True):
            result[:] = _filtered(image, factors)
        return filtered

    def references(self, averages, counts):
        """``References`` of averages, (n_classes, n, n) and (n_classes,)."""
        images, (own, growth, unit) = np.empty(averages.shape, np.float32), np.empty((3, len(averages)))
        n_pixels = averages[0].size
        for k, count in enumerate(np.maximum(counts, 1)):
            factors = self.filter(count)
            image = _filtered(averages[k] * self.edge, factors) * self.edge
            image -= image[self.disc].mean()
            variance = (image[self.disc]**2).mean()
            images[k] = image / np.sqrt(variance)
            own[k] = (factors * self._own).sum() / n_pixels / np.sqrt(variance)
            noise = (factors**2 * self._level * self._times).sum() / n_pixels  # of a single particle, filtered
            growth[k] = np.sqrt(1 + noise * (1 / max(count - 1, 1) - 1 / count) / variance)
            unit[k] = self._log_likelihood_unit(factors) / np.sqrt(variance)
        return References(images, counts, own, growth, float(np.average(unit, weights=counts)))

    def _log_likelihood_unit(self, factors):
        """By how much the product with a filtered average grows where a view is e times as likely.

        For two views that is the variance of the difference of their products over the difference of its means. The
        power of what views differ by is taken for S / (1 + S) of the noise's.
        """
        s = self.ratio[self._ring]
        differing = self._times * self._level * s / (1 + s)
        return (factors**2 * self._level * differing).sum() / (factors * differing).sum()


def centered_average(moved, poses):
    """Average of particles as ``moved`` by their poses, itself moved so that poses onto it shift by 0 px in the mean.

    Where particles are centred to within the search, so that none of one view is beyond it. The centre of what is seen
    may be elsewhere.

    Parameters
    ----------
    moved : (n_images, n, n) float32
    poses : (n_images,) geometry.POSE

    Returns
    -------
    (n, n) float32
    """
    shift = np.where(poses["mirror"] != 0, -poses["sx"], poses["sx"]).mean(), poses["sy"].mean()
    return fourier_shift(moved.mean(axis=0, dtype=np.float64), -np.array(shift)).astype(np.float32)


def _filtered(image, factors):
    return scipy.fft.irfft2(scipy.fft.rfft2(image) * factors, s=image.shape)


@dataclass(frozen=True)
class References:
    """Averages as particles are held against them.

    Attributes
    ----------
    images : (n_classes, n, n) float32
        Filtered, of mean 0 and deviation 1 over the disc.
    counts : (n_classes,) int
        Particles in each; 0 in some, which no particle goes to any more.
    own : (n_classes,) float64
        What a member adds by itself to its score, times ``counts``.
    growth : (n_classes,) float64
        By how much the deviation of the filtered average grows without one of its members.
    unit : float
        By how much the score of a class grows where it is e times as likely.
    """

    images: np.ndarray
    counts: np.ndarray
    own: np.ndarray
    growth: np.ndarray
    unit: float

    def fair(self, scores, classes, part_of):
        """Scores as if no particle had a part in an average; minus infinity with a class that has no other particle.

        Parameters
        ----------
        scores : (..., n_particles)
        classes : (..., n_particles) or (..., 1) int
        part_of : (n_particles,) int
            The class whose average a particle is in; -1 if in none.
        """
        own, m = classes == part_of, self.counts[classes]
        without = (m * scores - self.own[classes]) / np.maximum(m - 1, 1) / self.growth[classes]
        return np.where(m - own > 0, np.where(own, without, scores), -np.inf)

    def prior(self, classes, part_of):
        """What to add to :meth:`fair` scores, as a larger class is as much more likely.

        Of two classes of one view each would else draw half of the particles of both, whatever else is in them.
        """
        return self.unit * np.log(np.maximum(self.counts[classes] - (classes == part_of), 1))
