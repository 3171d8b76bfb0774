"""References to ring spectra; images, poses and spectra to alignments (SPEC sections 3, 4 and 6).

Arrays in, arrays out: this module knows no file and no rank. Imports geometry, kernels and errors only.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numba
import numpy as np
import scipy.fft

from mrefali import geometry
from mrefali.compiled import kernels
from mrefali.errors import InputError

#: A first look at a reference takes the angular frequencies of each ring up to one of these, in 1/px, that leaves out
#: no more than such a share of its amplitude.
FIRST_LOOK_FREQUENCIES, LOST_SHARE = (0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.275, 0.3, 0.35, 0.4), 0.02

#: Error of a peak by float32 arithmetic, as a share of the highest that is possible: ten times what is ever seen.
ROUNDING = 1e-5

#: Pairs of particle and reference of which a search keeps what it found at a time, where peaks alone are asked for.
FOUND_AT_ONCE = 1 << 18

#: Smallest translation step in px: a finer one tells nothing more, and would be searched for years.
SMALLEST_STEP = 0.01


@dataclass(frozen=True)
class Search:
    """What is searched: rings and translations, all in px, and whether mirrored particles too."""

    box: int
    inner_radius: int
    outer_radius: int
    ring_step: int
    xr: float
    yr: float
    shift_step: float
    mirror: bool = True

    def __post_init__(self):
        geometry.check_rings(self.box, self.inner_radius, self.outer_radius, self.ring_step)
        for name, value in (("xr", self.xr), ("yr", self.yr)):
            if not 0 <= value < np.inf:
                raise InputError(f"{name}={value} is not allowed: give the half-range of the search in px, 0 or more")
        if not SMALLEST_STEP <= self.shift_step < np.inf:
            raise InputError(f"ts={self.shift_step} is not allowed: give a translation step in px of at least "
                             f"{SMALLEST_STEP}")

    @cached_property
    def rings(self):
        """The tables of ``kernels.Rings``, rings from the outermost inward."""
        radii = geometry.ring_radii(self.inner_radius, self.outer_radius, self.ring_step)[::-1]
        lengths = geometry.ring_lengths(radii)
        angles = [2 * np.pi * np.arange(length) / length for length in lengths]
        with_frequency = [(lengths // 2 >= k).sum() for k in range(lengths[0] // 2 + 1)]
        padded = -(-np.array(with_frequency) // kernels.UNROLL) * kernels.UNROLL
        twiddles, first_twiddle = _fft_twiddles(lengths[0])
        phase = 2 * np.pi * np.arange(lengths[0] // 2 + 1) / lengths[0]
        return kernels.Rings(
            x=np.concatenate([r * np.sin(t) for r, t in zip(radii, angles, strict=True)]),
            y=np.concatenate([r * np.cos(t) for r, t in zip(radii, angles, strict=True)]),
            lengths=lengths,
            weights=2 * np.pi * radii / lengths,
            first_row=np.concatenate([[0], np.cumsum(padded)]),
            twiddles=twiddles,
            first_twiddle=first_twiddle,
            phases=np.stack([np.cos(phase), np.sin(phase)], axis=1).astype(np.float32),
            n_rows=padded,
            total_weight=float((2 * np.pi * radii).sum()),
        )

    @cached_property
    def shifts(self):
        """The translations of ``kernels.Shifts``; a step of p/q px is q x q grids of strides of p px."""
        widest = self.box - 2 * self.outer_radius - 2  # left and right limits together, whatever the centre
        nx, ny = (min(2 * whole_steps(min(half, widest), self.shift_step), whole_steps(widest, self.shift_step)) + 1
                  for half in (self.xr, self.yr))
        step = Fraction(self.shift_step).limit_denominator(1000)
        whole = abs(step - Fraction(self.shift_step)) < 1e-9 and step.denominator <= max(nx, ny)
        # of any other step every grid is a single shift, and its stride is never used
        parts, stride = (step.denominator, min(step.numerator, self.box)) if whole else (max(nx, ny), 1)
        return kernels.Shifts(float(self.shift_step), stride, parts, -(-nx // parts), -(-ny // parts),
                              bool(self.mirror))


def whole_steps(distance, step):
    """How many whole steps fit into a distance of at least 0; 0.3 holds three of 0.1, whatever the division says."""
    return np.floor(np.asarray(distance) / step + 1e-6).astype(np.int64)


def _fft_twiddles(longest):
    """Factors of the radix-4 passes for every power of two from 4 to ``longest``, and where each size begins."""
    tables, first = [], np.zeros(32, np.int64)
    for exponent in range(2, int(longest).bit_length()):
        first[exponent] = sum(t.size for t in tables)
        n = 1 << exponent
        while n >= 4:
            w = np.exp(-2j * np.pi * np.outer(np.arange(n // 4), [1, 2, 3]) / n)
            tables.append(np.stack([w.real, w.imag], axis=-1).ravel())
            n //= 4
    return np.concatenate(tables).astype(np.float32), first


def ring_spectra(references, search):
    """Weighted ring spectra of references (SPEC section 4).

    Parameters
    ----------
    references : (n_references, n, n) float32
        Normalised: minus the mean under the mask.
    search : Search

    Returns
    -------
    kernels.References
    """
    rings = search.rings
    centre = references.shape[1] // 2
    longest = rings.lengths[0]
    # a power of two changes no bit of the result, and keeps products of any references within float32
    scale = 2.0 ** np.frexp(np.abs(references).max())[1]
    samples = _bilinear(references / scale, centre + rings.x, centre + rings.y)
    unpacked = np.zeros((len(references), rings.first_row[-1]), np.complex128)
    constants = np.zeros(len(references))
    starts = np.concatenate([[0], np.cumsum(rings.lengths)])
    for ring, length in enumerate(rings.lengths):
        spectrum = scipy.fft.rfft(samples[:, starts[ring]:starts[ring + 1]]) * rings.weights[ring] * longest / length
        if length < longest:
            spectrum[:, -1] /= 2
        unpacked[:, rings.first_row[:length // 2 + 1] + ring] = spectrum
        constants += spectrum[:, 0].real * length
    blocks = unpacked.reshape(len(references), -1, kernels.UNROLL)
    packed = np.stack([blocks.real, blocks.imag], axis=2).astype(np.float32)
    return kernels.References(packed.reshape(len(references), -1), constants, *_first_look(unpacked, rings), scale)


def only(references, which):
    """``kernels.References`` of those references that ``which``, an array of indices, names."""
    return references._replace(packed=references.packed[which], constants=references.constants[which],
                               lost=references.lost[which])


def _first_look(spectra, rings):
    """Rows in which the references have most of their power, and a bound on what the others add to a peak.

    Of each ring the frequencies up to 2 pi r f are kept, f being the smallest that leaves ``LOST_SHARE`` of every
    reference. A particle's samples have mean 0 and deviation 1, so by Cauchy and Schwarz what is left out adds at
    most sqrt(sum |C|^2 L / w) sqrt(sum w) / Lmax, w being the weight of a sample. The bound holds ``ROUNDING`` of
    the same for all rows besides.

    Parameters
    ----------
    spectra : (n_references, rows) complex
        Weighted ring spectra.
    rings : kernels.Rings

    Returns
    -------
    kept, n_kept, kept_of_ring, lost
        As in ``kernels.References``.
    """
    n_freq, longest = len(rings.first_row) - 1, rings.lengths[0]
    frequency = np.repeat(np.arange(n_freq), np.diff(rings.first_row))
    ring = np.arange(len(frequency)) - rings.first_row[frequency]  # of a padding row a ring that has not the frequency
    ring = np.minimum(ring, len(rings.lengths) - 1)
    length, weight = rings.lengths[ring], rings.weights[ring]
    # frequencies 0 and Lmax / 2 count once and all others twice; at its own L / 2 a shorter ring has half its weight
    times = np.where(frequency == 0, 1, np.where(2 * frequency < length, 2, np.where(length < longest, 4, 1)))
    power = times * np.abs(spectra) ** 2 * length / weight

    def bound(power):
        return np.sqrt(power.sum(axis=1) * rings.total_weight) / longest

    kept, lost = rings.n_rows, np.zeros(len(spectra))
    for f in FIRST_LOOK_FREQUENCIES:
        wanted = frequency <= weight * length * f  # weight * length = 2 pi r
        rows = np.bincount(frequency[wanted & (power.max(axis=0) > 0)], minlength=n_freq)
        padded = -(-rows // kernels.UNROLL) * kernels.UNROLL
        left_out = np.where(np.arange(len(frequency)) - rings.first_row[frequency] >= padded[frequency], power, 0.0)
        if (bound(left_out) <= LOST_SHARE * bound(power)).all():
            kept, lost = padded, bound(left_out)
            break
    last = [np.flatnonzero(kept > i).max(initial=-1) for i in range(len(rings.lengths))]
    return (kept, int(np.flatnonzero(kept).max(initial=-1)) + 1, np.minimum(np.array(last), rings.lengths // 2) + 1,
            lost + ROUNDING * bound(power))


def _bilinear(images, x, y):
    """Bilinear samples (n_images, n_samples) of images at (x, y) px; a sample on the last pixel meets no other."""
    i, j = np.floor(x).astype(int), np.floor(y).astype(int)
    u, v = x - i, y - j
    n = images.shape[1]
    right, below = np.minimum(i + 1, n - 1), np.minimum(j + 1, n - 1)
    corners = n * j + i, n * j + right, n * below + i, n * below + right
    samples = np.empty((len(images), len(x)))
    for image, out in zip(images.reshape(len(images), -1), samples, strict=True):  # one stays in the processor's cache
        a, b, c, d = (image[corner] for corner in corners)
        out[:] = (1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * c + u * d)
    return samples


@dataclass(frozen=True)
class Alignments:
    """Where particles belong, one entry a particle.

    Attributes
    ----------
    assign : (n_particles,) int32
        Index of the reference.
    poses : (n_particles,) geometry.POSE
    peak : (n_particles,) float64
        Height of the correlation, of the particle in units of its standard deviation over the rings.
    """

    assign: np.ndarray
    poses: np.ndarray
    peak: np.ndarray


def start_centres(poses, search):
    """Where each particle's rings are centred at shift 0, relative to the centre pixel (SPEC section 4).

    A particle whose centre lies so far out that the disc would leave the image starts from the identity.

    Returns
    -------
    (n_particles, 2) float64, px
        x, y.
    """
    h = geometry.inverse_shift(poses)
    limit = search.box // 2 + 1 - search.outer_radius - 2
    h[(np.abs(h) > limit).any(axis=1)] = 0.0
    return h


def align(images, poses, references, search):
    """Best reference and pose of every particle (SPEC section 4), on numba's present number of threads.

    Parameters
    ----------
    images : (n_particles, n, n) float32
    poses : (n_particles,) geometry.POSE
        Where the search starts; of these only the shift matters, carried back through the rotation.
    references : kernels.References
        See :func:`ring_spectra`.
    search : Search

    Returns
    -------
    Alignments
        Of equal peaks the later one wins, in the order y shift, x shift, reference.
    """
    h, found = _find(images, poses, references, search, (len(images),), kernels.search)
    return _alignments(h, found, references, search)


def align_each(images, poses, references, search):
    """Best pose of every particle against each of the references, as :func:`align` has it for a single one.

    Returns
    -------
    Alignments
        Arrays (n_references, n_particles).
    """
    shape = len(references.constants), len(images)
    return _alignments(*_find(images, poses, references, search, shape, kernels.search_each), references, search)


def peaks_of_each(images, poses, references, search):
    """Peak of every particle with each of the references, that of :func:`align_each`.

    Returns
    -------
    (n_particles, n_references) float32
    """
    peaks = np.empty((len(images), len(references.constants)), np.float32)
    at_once = max(1, FOUND_AT_ONCE // len(references.constants))
    for first in range(0, len(images), at_once):
        some = slice(first, first + at_once)
        shape = len(references.constants), len(images[some])
        _, found = _find(images[some], poses[some], references, search, shape, kernels.search_each)
        peaks[some] = found.peak.T * references.scale
    return peaks


def align_to(images, poses, assign, references, search):
    """Best pose of every particle against the reference that ``assign`` says, as :func:`align` has it for that alone.

    Parameters
    ----------
    assign : (n_particles,) int32
        The others are as for :func:`align`.

    Returns
    -------
    Alignments
    """
    found = Alignments(assign.copy(), np.empty(len(images), geometry.POSE), np.empty(len(images)))
    for k in np.unique(assign):
        mine = np.flatnonzero(assign == k)
        aligned = align(images[mine], poses[mine], only(references, [k]), search)
        found.poses[mine], found.peak[mine] = aligned.poses, aligned.peak
    return found


def _find(images, poses, references, search, shape, kernel):
    """Where the rings are centred at shift 0, and ``kernels.Found`` of this shape, by this kernel."""
    h = start_centres(poses, search)
    first, count = np.empty((2, len(images), 2), np.int64)
    for axis, half in enumerate((search.xr, search.yr)):
        left, right = geometry.search_range(half, h[:, axis], search.box, search.outer_radius)
        first[:, axis] = -whole_steps(left, search.shift_step)
        count[:, axis] = whole_steps(right, search.shift_step) - first[:, axis] + 1
    found = kernels.Found(
        peak=np.empty(shape), assign=np.zeros(shape, np.int32), alpha=np.zeros(shape), mirror=np.zeros(shape, np.int32),
        ix=np.zeros(shape, np.int64), iy=np.zeros(shape, np.int64))
    n_chunks = min(4 * numba.get_num_threads(), -(-len(images) // kernels.LANES))  # each has buffers of its own
    kernel(images, search.box // 2 + h, first, count, references, search.rings, search.shifts, n_chunks, found)
    return h, found


def _alignments(h, found, references, search):
    return Alignments(found.assign, _new_poses(h, found, search.shift_step), found.peak * references.scale)


def _new_poses(h, found, step):
    """A shift by -h, then rotation with shift R(a)(-ix, -iy), then the mirror (SPEC section 4, "Result")."""
    a = np.deg2rad(found.alpha)
    c, s = np.cos(a), np.sin(a)
    ix, iy = found.ix * step, found.iy * step
    turned = geometry.make_poses(found.alpha, -c * ix - s * iy, s * ix - c * iy, found.mirror)
    return geometry.compose(geometry.make_poses(0.0, -h[:, 0], -h[:, 1]), turned)
