"""What of particles is signal by their spectra, and averages filtered for what tells views apart.

Arrays in, arrays out: this module knows no file and no rank.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import scipy.fft

from mrefali import geometry
from mrefali.ctf import LEAST_CTF_SQ
from mrefali.errors import InputError
from mrefali.fourier import half_spectrum
from mrefali.reference import fourier_shift

#: Width in px of the soft edge within which images are compared.
EDGE = 3.0

#: A pose has three parameters, and by fitting them noise alone is half as many times e times as likely (Wilks). A
#: particle's own part in an average holds its pose where it is, so that a fair score lacks this.
FITTED = 1.5


class Contrast:
    """What of the particles is signal, ring by ring of Fourier space, and averages filtered for it.

    The noise is that of the corners, beyond the soft edge, or else that of high frequencies; what the disc has beyond
    it is signal. With S their ratio an average of m particles is multiplied by S / ((1 + S) (S + 1/m)): by
    S / (S + 1/m) for its noise, and divided by 1 + S since all views have much in common where S is large, at low
    frequencies. The last ring counts for nothing.

    Parameters
    ----------
    images : iterable of (n, n) float32
    radius : float, px
    mask : (n, n) float32, optional
        Within which averages are.
    ctf_sq : (n_images, n_radii) float64, optional
        CTF^2 at Fourier pixels 0, 1, 2, ... of images that are multiplied by their CTF.
    snr : float
        Of the Wiener term, with which the averages of these are divided, see :func:`mrefali.ctf.wiener_divide`.
    """

    def __init__(self, images, radius, mask=None, ctf_sq=None, snr=np.inf):
        images = iter(images)
        first = next(images)
        n = len(first)
        y, x = np.indices((n, n)) - n // 2
        self.edge = np.clip((radius + EDGE - np.hypot(x, y)) / EDGE, 0, 1).astype(np.float32)
        self._window = self.edge if mask is None else self.edge * mask
        self.disc = geometry.disc(n, radius)
        frequency, self._times = half_spectrum(n)
        self._ring = np.minimum(np.rint(frequency).astype(int), n // 2)
        power, noise, own = self._ring_powers(chain([first], images))
        # where the corners are masked, or are of another kind, the noise is what is left at high frequencies
        highest = slice(3 * n // 8, None)
        if not 0.5 < noise[highest].mean() / power[highest].mean() < 2:
            noise = np.full(len(power), power[highest].mean())
        noise = np.maximum(noise, np.finfo(np.float32).eps * noise.max())  # where the particles were filtered, 0
        self.ratio = np.maximum(power / noise - 1, 0)
        self.ratio[-1] = 0  # the last ring has the corners of Fourier space in it, which a turned image has lost
        if not (self.ratio[1:] > 0).any():
            # radius may be of particles that were shrunk, and not what a user gave
            raise InputError("the particles have nothing within the radius ou that they have not outside it, or at "
                             "high frequencies: they seem to be noise alone; give an ou that holds the molecule alone")
        self.ratio[0] = self.ratio[1]  # the mean of a particle says nothing
        self._level = noise[self._ring]
        self._snr, self._ctf_sq, self._ctf_varies = snr, 1.0, 1.0
        if ctf_sq is not None:
            mean = np.maximum(ctf_sq.mean(axis=0), LEAST_CTF_SQ)
            self._ctf_sq = mean[self._ring]
            self._ctf_varies = np.maximum((ctf_sq**2).mean(axis=0) / mean**2, 1)[self._ring]
        # what a coefficient of a filtered particle adds to its product with itself over the disc
        self._own = own[self._ring] * self._times

    def _ring_powers(self, images):
        """Means over the rings of Fourier space, (n_rings,) each.

        Returns
        -------
        power, noise
            Power of a coefficient within the window, and outside the edge, for each pixel there.
        own
            Product of a coefficient within the window with that within the window and the disc.
        """
        outside, inside = 1 - self.edge, self._window * self.disc
        sums, n_images = np.zeros((3, *self._ring.shape)), 0
        for image in images:  # spectra of all together would be several copies of them
            level = (image * outside).sum(dtype=np.float64) / outside.sum(dtype=np.float64)
            whole = scipy.fft.rfft2(image * self._window)
            sums[0] += np.abs(whole)**2
            sums[1] += np.abs(scipy.fft.rfft2((image - np.float32(level)) * outside))**2
            sums[2] += (whole.conj() * scipy.fft.rfft2(image * inside)).real
            n_images += 1
        n_coefficients = np.bincount(self._ring.ravel())
        power, noise, own = (np.bincount(self._ring.ravel(), s.ravel()) / n_coefficients / n_images for s in sums)
        return power / (self._window**2).sum(), noise / (outside**2).sum(), own

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
        """``References`` of averages (n_classes, n, n) of ``counts`` particles, 0 of none, filtered as they may be."""
        images, (own, growth, unit) = np.empty(averages.shape, np.float32), np.empty((3, len(averages)))
        n_pixels = averages[0].size
        for k, count in enumerate(np.maximum(counts, 1)):
            factors, within = self.filter(count), averages[k] * self._window
            left = factors * self._left(within, count)
            image = _filtered(within, factors) * self._window
            image -= image[self.disc].mean()
            variance = (image[self.disc]**2).mean()
            images[k] = image / np.sqrt(variance)
            part = left / self._divisor(count)
            own[k] = (part * self._own).sum() / n_pixels / np.sqrt(variance)
            noise = (part**2 * self._level * self._times).sum() / n_pixels  # of a single particle
            growth[k] = np.sqrt(1 + noise * (1 / max(count - 1, 1) - 1 / count) / variance)
            unit[k] = self._log_likelihood_unit(factors) / np.sqrt(variance)
        return References(images, counts, own, growth, float(np.average(unit, weights=counts)))

    def _left(self, within, count):
        """How much of its amplitude moving and filtering have left of an average ``within`` the window, at most 1.

        By its power, in each ring: that of particles, which it would have, is known.
        """
        ring = self._ring.ravel()
        power = np.bincount(ring, np.abs(scipy.fft.rfft2(within)).ravel()**2) / np.bincount(ring)
        expected = self._level * (self.ratio[self._ring] / self._ctf_varies + 1 / count) / self._divisor(count)**2
        expected = np.bincount(ring, expected.ravel()) / np.bincount(ring) * (self._window**2).sum()
        return np.sqrt(np.minimum(power / expected, 1))[self._ring]

    def _divisor(self, count):
        """What the mean of so many particles, multiplied by their CTF, is divided by."""
        return self._ctf_sq + 1 / (self._snr * count)

    def _log_likelihood_unit(self, factors):
        """By how much the product with a filtered average grows where a view is e times as likely.

        For two views that is the variance of the difference of their products over the difference of its means. The
        power of what views differ by is taken for S / (1 + S) of the noise's.
        """
        s = self.ratio[self._ring]
        differing = self._times * self._level * s / (1 + s)
        return (factors**2 * self._level * differing).sum() / (factors * self._ctf_sq * differing).sum()


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
    return fourier_shift(moved.mean(axis=0, dtype=np.float64), -geometry.mean_shift(poses)).astype(np.float32)


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
        return np.where(m - own > 0, np.where(own, without + FITTED * self.unit, scores), -np.inf)

    def prior(self, classes, part_of):
        """What to add to :meth:`fair` scores, as a larger class is as much more likely.

        Of two classes of one view each would else draw half of the particles of both, whatever else is in them.
        """
        return self.unit * np.log(np.maximum(self.counts[classes] - (classes == part_of), 1))
