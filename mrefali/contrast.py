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
    frequencies.

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
        if not (power[1:] > noise[1:]).any():
            raise InputError(f"the particles have nothing within radius ou={radius} that they have not outside it, or "
                             "at high frequencies: they seem to be noise alone")
        self.ratio = np.maximum(power / noise - 1, 0)
        self.ratio[0] = self.ratio[1]  # the mean of a particle says nothing
        self.ratio[-1] = 0  # a turned image has lost what was beyond the last circle of Fourier space
        self._level = noise[self._ring]
        # what a coefficient of a filtered particle adds to its product with itself over the disc, noise to a variance
        own = self._ring_power(images, self.edge, self.edge * self.disc)
        self._own = OWN_SHARE * own[self._ring] * self._times
        self._noise = self._level * self.disc.sum() * self._times

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
        images, (own, growth, prior) = np.empty(averages.shape, np.float32), np.empty((3, len(averages)))
        n_pixels, area = averages[0].size, self.disc.sum()
        for k, count in enumerate(np.maximum(counts, 1)):
            factors = self.filter(count)
            image = _filtered(averages[k] * self.edge, factors) * self.edge
            image -= image[self.disc].mean()
            variance = (image[self.disc]**2).mean()
            images[k] = image / np.sqrt(variance)
            own[k] = (factors * self._own).sum() / n_pixels / np.sqrt(variance)
            noise = (factors**2 * self._noise).sum() / n_pixels / area  # of a single particle, filtered
            growth[k] = np.sqrt(1 + noise * (1 / max(count - 1, 1) - 1 / count) / variance)
            prior[k] = np.log(count) * self._log_likelihood_unit(factors) / np.sqrt(variance)
        return References(images, np.maximum(counts, 1), own, growth, prior)

    def _log_likelihood_unit(self, factors):
        """By how much the product with a filtered average grows where a view is e times as likely, in white noise.

        Of two views it is the variance of the difference of their products over that of its means; views differ as
        S / (1 + S) in a coefficient.
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
        Particles in each.
    own : (n_classes,) float64
        What a member adds by itself to its score, times ``counts``.
    growth : (n_classes,) float64
        By how much the deviation of the filtered average grows without one of its members.
    prior : (n_classes,) float64
        What a score gains by the size of the class: a particle is as much more likely to be of a class as that is
        larger, and of two alike each would else draw half of the particles of both.
    """

    images: np.ndarray
    counts: np.ndarray
    own: np.ndarray
    growth: np.ndarray
    prior: np.ndarray

    def without_own(self, scores, classes):
        """Scores as if each of the particles had no part in the average of its class, one of ``classes``."""
        m = self.counts[classes]
        return (m * scores - self.own[classes]) / np.maximum(m - 1, 1) / self.growth[classes]

    def fair(self, scores, classes, part_of):
        """Scores by which a particle chooses its class.

        They count without its own part in an average, and with the prior.

        Parameters
        ----------
        scores : (..., n_particles)
        classes : (..., n_particles) or (..., 1) int
        part_of : (n_particles,) int, or None
            Classes of which the particles are part; of none at all if None.
        """
        fair = scores if part_of is None else np.where(classes == part_of, self.without_own(scores, classes), scores)
        return fair + self.prior[classes]
