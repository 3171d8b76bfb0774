"""Every ``@njit`` function and nothing else. Imports nothing of ours; knows no file, no unit and no object.

The search runs over *lanes*: one lane is one (particle, shift) pair, ``LANES`` of them side by side in the last
axis of every buffer, so that each step (bilinear samples, ring FFT, products, inverse FFT, peak) is the same
arithmetic on ``LANES`` neighbouring numbers. A lane never meets another, so what a particle gets cannot depend on
the number of threads or on what stands beside it.

Three things keep the inner loops in vector registers and look odd otherwise: loop lengths over lanes are literals;
indices are unsigned, or arrays are sliced before an inner loop (an index that might be negative would be checked at
each step); and ``lane_njit`` compiles what runs over lanes.
"""

from collections import namedtuple

import numpy as np
from numba import njit, prange
from numba.core.compiler import Compiler

LANES = 16
UNROLL = 8  # rings that one pass of the product takes together; ring counts are padded to a multiple


class _NoOverlap(Compiler):
    """numba's compiler, told that no two arrays a function is given overlap.

    Else each loop over lanes begins with a comparison of addresses, which takes as long as the loop.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.state.flags.noalias = True


#: Compiles a function over lanes; its sums may be taken in any order, which is fixed once it is compiled.
lane_njit = njit(fastmath=True, cache=True, pipeline_class=_NoOverlap)

#: Tables of the rings, outermost first, that depend on box and search only (built by ``search.py``).
Rings = namedtuple("Rings", [
    "x", "y",  # (n_samples,) float64: samples relative to the centre, px, ring after ring
    "lengths",  # (n_rings,) int64: samples on each ring, a power of two
    "weights",  # (n_rings,) float64: 2 pi r / L, what one sample counts in mean and variance
    "first_row",  # (n_freq + 1,) int64: where the rows (rings) of each angular frequency begin; padded to UNROLL
    "twiddles",  # float32: factors of the radix-4 passes, size after size
    "first_twiddle",  # (20,) int64: where those of size 2**i begin
    "phases",  # (Lmax / 2 + 1, 2) float32: cos and sin of 2 pi k / Lmax
    "n_rows",  # (n_freq,) int64: rows of each frequency
    "total_weight",  # float: of all samples
])

#: The poses tried (built by ``search.py``): a step of p/q px is q x q grids of whole strides of p px.
Shifts = namedtuple("Shifts", [
    "step",  # float: px
    "stride",  # p
    "parts",  # q
    "nx", "ny",  # shifts of one grid, per axis
    "mirror",  # bool: mirrored particles too
])

#: The references (built by ``search.py``).
References = namedtuple("References", [
    "packed",  # (n_references, 2 * rows) float32: weighted ring spectra, see _correlate
    "constants",  # (n_references,) float64: what an image of ones adds at frequency 0
    "kept",  # (n_freq,) int64: rows of each frequency, outermost rings first, that a first look takes
    "n_kept",  # frequencies with such rows
    "kept_of_ring",  # (n_rings,) int64: frequencies of each ring that a first look takes
    "lost",  # (n_references,) float64: bound on what the other rows, and rounding, add to any peak
    "scale",  # float: what the references were divided by
])

#: What the search found, one entry a particle.
Found = namedtuple("Found", [
    "peak",  # float64: height of the correlation
    "assign",  # int32: reference
    "alpha",  # float64: degrees
    "mirror",  # int32
    "ix", "iy",  # int64: index of the shift
])

#: Buffers of one thread. Candidates are (particle, shift) pairs, all those of a particle side by side.
Scratch = namedtuple("Scratch", [
    "strips", "base", "below", "u", "v",  # of the particles in the present block, see spread_shifts, locate_samples
    "a", "b",  # (2 * LANES * Lmax,) float32: what an FFT goes to and fro between
    "spectra",  # (2 * LANES * rows,) float32: ring spectra of the lanes
    "sums",  # (2 * LANES,) float32: sums of samples and of their squares over one ring
    "moments",  # (2, LANES) float64: the same over all rings, weighted
    "largest",  # (2 * LANES,) float32: largest straight correlation of each lane, then largest mirrored one
    "bounds",  # (n_candidates, n_references) float32: what no peak can exceed
    "promise",  # (n_candidates,) float32: the largest of these; -inf where a candidate is done with
    "offset_scale",  # (2, n_candidates) float64: twice the mean of the samples; from correlation to peak
    "lanes",  # (LANES,) int64: candidate in each
    "offset", "scale",  # (LANES,) float64: the same of each lane
    "exact",  # (n_references,) bool: looked at in full
])


# --- FFT across lanes: element e of a buffer is 2 * LANES floats, real parts, then imaginary parts


@njit(inline="always", fastmath=True)
def _radix4(x, y, n, s, w):
    """One radix-4 pass (Stockham, decimation in frequency) of length n and stride s, from x to y.

    With n and s literals, as below, it is up to 1.4 times as fast.
    """
    m = n // 4
    for p in range(m):
        w1r, w1i, w2r, w2i, w3r, w3i = (
            w[6 * p], w[6 * p + 1], w[6 * p + 2], w[6 * p + 3], w[6 * p + 4], w[6 * p + 5])
        for q in range(s):
            a = 2 * LANES * (q + s * p)
            b = a + 2 * LANES * s * m
            c = b + 2 * LANES * s * m
            d = c + 2 * LANES * s * m
            e = 2 * LANES * (q + 4 * s * p)
            f = e + 2 * LANES * s
            g = f + 2 * LANES * s
            h = g + 2 * LANES * s
            for i in range(LANES):
                j = LANES + i
                sum_r, sum_i = x[a + i] + x[c + i], x[a + j] + x[c + j]
                dif_r, dif_i = x[a + i] - x[c + i], x[a + j] - x[c + j]
                odd_r, odd_i = x[b + i] + x[d + i], x[b + j] + x[d + j]
                rot_r, rot_i = x[b + j] - x[d + j], x[d + i] - x[b + i]  # -i (b - d)
                y[e + i], y[e + j] = sum_r + odd_r, sum_i + odd_i
                tr, ti = dif_r + rot_r, dif_i + rot_i
                y[f + i], y[f + j] = w1r * tr - w1i * ti, w1r * ti + w1i * tr
                tr, ti = sum_r - odd_r, sum_i - odd_i
                y[g + i], y[g + j] = w2r * tr - w2i * ti, w2r * ti + w2i * tr
                tr, ti = dif_r - rot_r, dif_i - rot_i
                y[h + i], y[h + j] = w3r * tr - w3i * ti, w3r * ti + w3i * tr


@lane_njit
def _passes16(x, y, w):
    _radix4(x, y, 16, 1, w)


@lane_njit
def _passes32(x, y, w):
    _radix4(x, y, 32, 1, w)
    _radix4(y, x, 8, 4, w[48:])


@lane_njit
def _passes64(x, y, w):
    _radix4(x, y, 64, 1, w)
    _radix4(y, x, 16, 4, w[96:])


@lane_njit
def _passes128(x, y, w):
    _radix4(x, y, 128, 1, w)
    _radix4(y, x, 32, 4, w[192:])
    _radix4(x, y, 8, 16, w[240:])


@lane_njit
def _passes256(x, y, w):
    _radix4(x, y, 256, 1, w)
    _radix4(y, x, 64, 4, w[384:])
    _radix4(x, y, 16, 16, w[480:])


@lane_njit
def _passes512(x, y, w):
    _radix4(x, y, 512, 1, w)
    _radix4(y, x, 128, 4, w[768:])
    _radix4(x, y, 32, 16, w[960:])
    _radix4(y, x, 8, 64, w[1008:])


@lane_njit
def _passes1024(x, y, w):
    _radix4(x, y, 1024, 1, w)
    _radix4(y, x, 256, 4, w[1536:])
    _radix4(x, y, 64, 16, w[1920:])
    _radix4(y, x, 16, 64, w[2016:])


@lane_njit
def _passes(x, y, w, n):
    """Lengths that literals do not cover, slower: 4 and 8, and those of boxes above 326 px."""
    s = 1
    while n > 4:
        _radix4(x, y, n, s, w)
        w = w[6 * (n // 4):]
        x, y = y, x
        n //= 4
        s *= 4


@lane_njit
def _last_radix4(x, y, s):
    """The last pass, from x to y, where the length 4 s is a power of four: no factors."""
    step = np.uint64(2 * LANES * s)
    for q in range(np.uint64(s)):
        a = np.uint64(2 * LANES) * q
        b = a + step
        c = b + step
        d = c + step
        for i in range(np.uint64(LANES)):
            j = np.uint64(LANES) + i
            sum_r, sum_i = x[a + i] + x[c + i], x[a + j] + x[c + j]
            dif_r, dif_i = x[a + i] - x[c + i], x[a + j] - x[c + j]
            odd_r, odd_i = x[b + i] + x[d + i], x[b + j] + x[d + j]
            rot_r, rot_i = x[b + j] - x[d + j], x[d + i] - x[b + i]  # -i (b - d)
            y[a + i], y[a + j] = sum_r + odd_r, sum_i + odd_i
            y[b + i], y[b + j] = dif_r + rot_r, dif_i + rot_i
            y[c + i], y[c + j] = sum_r - odd_r, sum_i - odd_i
            y[d + i], y[d + j] = dif_r - rot_r, dif_i - rot_i


@lane_njit
def _last_radix2(x, y, s):
    """The last pass, from x to y, of any other length, 2 s."""
    for a in range(np.uint64(2 * LANES * s)):
        b = a + np.uint64(2 * LANES * s)
        y[a], y[b] = x[a] + x[b], x[a] - x[b]


@lane_njit
def _largest_radix4(x, s, largest):
    """The largest values in the 2 * LANES columns of what ``_last_radix4`` would give."""
    step = np.uint64(2 * LANES * s)
    largest[:] = -np.inf
    for q in range(np.uint64(s)):
        a = np.uint64(2 * LANES) * q
        b = a + step
        c = b + step
        d = c + step
        for i in range(np.uint64(LANES)):
            j = np.uint64(LANES) + i
            sum_r, sum_i = x[a + i] + x[c + i], x[a + j] + x[c + j]
            dif_r, dif_i = x[a + i] - x[c + i], x[a + j] - x[c + j]
            odd_r, odd_i = x[b + i] + x[d + i], x[b + j] + x[d + j]
            rot_r, rot_i = x[b + j] - x[d + j], x[d + i] - x[b + i]
            # the larger of x + y and x - y is x + |y|
            largest[i] = max(largest[i], max(sum_r + abs(odd_r), dif_r + abs(rot_r)))
            largest[j] = max(largest[j], max(sum_i + abs(odd_i), dif_i + abs(rot_i)))


@lane_njit
def _largest_radix2(x, s, largest):
    """The largest values in the 2 * LANES columns of what ``_last_radix2`` would give."""
    largest[:] = -np.inf
    for q in range(np.uint64(s)):
        a = np.uint64(2 * LANES) * q
        b = a + np.uint64(2 * LANES * s)
        for i in range(np.uint64(2 * LANES)):
            largest[i] = max(largest[i], x[a + i] + abs(x[b + i]))


@njit(cache=True)
def _all_but_the_last_pass(a, b, n, rings):
    """Of an FFT from a; returns its exponent, where the result is, and the other buffer."""
    e = 2
    while 1 << e < n:
        e += 1
    w = rings.twiddles[rings.first_twiddle[e]:]
    if n == 16:
        _passes16(a, b, w)
    elif n == 32:
        _passes32(a, b, w)
    elif n == 64:
        _passes64(a, b, w)
    elif n == 128:
        _passes128(a, b, w)
    elif n == 256:
        _passes256(a, b, w)
    elif n == 512:
        _passes512(a, b, w)
    elif n == 1024:
        _passes1024(a, b, w)
    else:
        _passes(a, b, w, n)
    return (e, a, b) if (e - 1) // 2 % 2 == 0 else (e, b, a)


@njit(cache=True)
def fft_lanes(a, b, n, rings):
    """Forward complex FFT of length n (a power of two, at least 4) in each lane.

    Parameters
    ----------
    a, b : (at least 2 * n * LANES,) float32
        The input and a scratch buffer; both are overwritten.

    Returns
    -------
    The one of a and b that holds the result.
    """
    e, x, y = _all_but_the_last_pass(a, b, n, rings)
    if e % 2 == 0:
        _last_radix4(x, y, n // 4)
    else:
        _last_radix2(x, y, n // 2)
    return y


@njit(cache=True)
def fft_largest(a, b, n, rings, largest):
    """As :func:`fft_lanes`, but only the largest real and imaginary parts are kept, in ``largest`` (2 * LANES,)."""
    e, x, _ = _all_but_the_last_pass(a, b, n, rings)
    if e % 2 == 0:
        _largest_radix4(x, n // 4, largest)
    else:
        _largest_radix2(x, n // 2, largest)


# --- polar samples


@njit(cache=True)
def spread_shifts(image, shifts, strips):
    """Copy ``image`` so that the pixels under one sample at all shifts lie side by side.

    ``strips[x + 1, y % p, y // p, i] = image[y, x + p i]``, 0 beyond the edge, p the stride: in the flattened array a
    shift down by p is as far as ``nx`` shifts to the right, and lane ``iy * nx + ix`` lies that far from lane 0.
    Column 0 is empty, so that there are lanes below lane 0.
    """
    n, p, nx = image.shape[0], shifts.stride, shifts.nx
    for y in range(n):
        row = image[y]
        target = strips[1:, y % p, y // p]
        for i in range(nx):
            for x in range(n - p * i):
                target[x, i] = row[x + p * i]


@njit(cache=True)
def strip_height(n, shifts):
    """Rows of one strip: those of the image and as many zeros as the largest shift and a spare block can touch."""
    return n // shifts.stride + 2 + shifts.ny + LANES // shifts.nx + 1


@njit(cache=True)
def locate_samples(rings, shifts, n, x0, y0, base, below, u, v):
    """Where the four pixels about each sample lie in the strips, and the sample's place between them.

    ``base`` and ``below`` are the offsets of the pixels (x, y) and (x, y + 1); those of x + 1 lie one column of
    strips further. (u, v) are the fractions.
    """
    p, nx = shifts.stride, shifts.nx
    height = strip_height(n, shifts)
    row_offset = np.empty(n + 1, np.int64)
    for y in range(n + 1):
        row_offset[y] = (y % p * height + y // p) * nx
    column = p * height * nx
    for s in range(rings.x.size):
        x, y = x0 + rings.x[s], y0 + rings.y[s]
        i, j = int(x), int(y)  # never negative: the disc lies inside the image
        u[s], v[s] = x - i, y - j
        base[s] = (i + 1) * column + row_offset[j]
        below[s] = (i + 1) * column + row_offset[j + 1]


@lane_njit
def _sample_shifts(pixels, column, base, below, u, v, first_shift, first_lane, out, sums):
    """One ring at neighbouring shifts into the lanes of ``out`` from ``first_lane`` on, which gets ``first_shift``.

    The sums and sums of squares are added to ``sums``, of all lanes.
    """
    one = np.float32(1.0)
    for s in range(base.size):
        w11 = u[s] * v[s]
        w10, w01 = v[s] - w11, u[s] - w11
        w00 = one - u[s] - w10
        a, c = base[s] + first_shift - first_lane, below[s] + first_shift - first_lane
        b, d = a + column, c + column
        row = np.uint64(s * LANES)
        for i in range(np.uint64(LANES)):
            value = w00 * pixels[a + i] + w01 * pixels[b + i] + w10 * pixels[c + i] + w11 * pixels[d + i]
            out[row + i] = value if i >= first_lane else out[row + i]
            sums[i] += value
            sums[np.uint64(LANES) + i] += value * value


@lane_njit
def _add_moments(sums, weight, first_lane, stop_lane, moments):
    """Add the weighted sums and sums of squares of one ring to the lanes they belong to, (2, LANES) float64."""
    for i in range(LANES):
        factor = weight if first_lane <= i < stop_lane else 0.0
        moments[0, i] += factor * sums[i]
        moments[1, i] += factor * sums[LANES + i]


@lane_njit
def _sample_alone(pixels, n, x, y, x0, y0, lane, out):
    """One ring about (x0, y0) into one lane of ``out``; ``pixels`` is a flat image of n x n."""
    one = np.float32(1.0)
    for s in range(x.size):
        i, j = int(x0 + x[s]), int(y0 + y[s])  # never negative: the disc lies inside the image
        u, v = np.float32(x0 + x[s] - i), np.float32(y0 + y[s] - j)
        w11 = u * v
        w10, w01 = v - w11, u - w11
        right, below = min(i + 1, n - 1), min(j + 1, n - 1) * n  # a sample on the last pixel meets no other
        out[np.uint64(s * LANES) + lane] = (
            (one - u - w10) * pixels[np.uint64(j * n + i)] + w01 * pixels[np.uint64(j * n + right)]
            + w10 * pixels[np.uint64(below + i)] + w11 * pixels[np.uint64(below + right)])


@lane_njit
def _unpack(z, length, n_freq, ring, rings, spectra):
    """From the half-length FFT ``z`` of one real ring twice its spectrum, up to frequency ``n_freq`` exclusive.

    Row ``first_row[k] + ring`` holds the real parts of frequency k in all lanes, then the imaginary parts.
    """
    half = length // 2
    stride = 2 * (rings.phases.shape[0] - 1) // length
    for k in range(n_freq):
        c, s = rings.phases[k * stride, 0], rings.phases[k * stride, 1]
        a, b = np.uint64(2 * LANES * (k % half)), np.uint64(2 * LANES * ((half - k) % half))
        row = np.uint64(2 * LANES * (rings.first_row[k] + ring))
        for i in range(np.uint64(LANES)):
            j = np.uint64(LANES) + i
            even_r, even_i = z[a + i] + z[b + i], z[a + j] - z[b + j]
            odd_r, odd_i = z[a + j] + z[b + j], z[b + i] - z[a + i]
            spectra[row + i] = even_r + (c * odd_r + s * odd_i)
            spectra[row + j] = even_i + (c * odd_i - s * odd_r)


# --- correlation


@lane_njit
def _correlate(reference, spectra, first_row, n_rows, n_freq, z):
    """Spectrum of q + i t, the straight and the mirrored correlation with one reference, reversed in frequency.

    ``reference`` holds, for each frequency and each UNROLL rings, their real parts and their imaginary parts.
    Reversed, so that a forward FFT of z is the inverse one (equations of SPEC section 4). Of frequency k the first
    ``n_rows[k]`` rows count, and no frequency from ``n_freq`` on.
    """
    length = 2 * (first_row.size - 2)
    products = np.zeros(4 * LANES, np.float32)
    z[2 * LANES * n_freq:2 * LANES * (length - n_freq + 1)] = 0.0
    for k in range(n_freq):
        products[:] = 0.0
        for row in range(first_row[k], first_row[k] + n_rows[k], UNROLL):
            c = reference[2 * row:2 * row + 2 * UNROLL]
            d = spectra[2 * LANES * row:2 * LANES * (row + UNROLL)]
            for i in range(2 * LANES):
                for part in range(2):
                    total = products[2 * LANES * part + i]
                    for j in range(UNROLL):
                        total += c[UNROLL * part + j] * d[2 * LANES * j + i]
                    products[2 * LANES * part + i] = total
        forward = 2 * LANES * ((length - k) % length)
        zf, zb = z[forward:forward + 2 * LANES], z[2 * LANES * k:2 * LANES * (k + 1)]
        for i in range(LANES):
            rr, ri = products[i], products[LANES + i]  # real of the reference by real, imaginary of the particle
            ir, ii = products[2 * LANES + i], products[3 * LANES + i]
            straight_r, straight_i = rr + ii, ir - ri
            mirrored_r, mirrored_i = rr - ii, -(ir + ri)
            zb[i], zb[LANES + i] = straight_r + mirrored_i, mirrored_r - straight_i
            zf[i], zf[LANES + i] = straight_r - mirrored_i, straight_i + mirrored_r


@lane_njit
def _largest(z, length, largest):
    """Largest value of the 2 * LANES columns of ``z``."""
    largest[:] = z[:2 * LANES]
    for m in range(0, length, 4):
        x = z[2 * LANES * m:2 * LANES * (m + 4)]
        for i in range(2 * LANES):
            a = max(x[i], x[2 * LANES + i])
            b = max(x[4 * LANES + i], x[6 * LANES + i])
            largest[i] = max(largest[i], max(a, b))


@njit(cache=True)
def refine_angle(z, column, length, largest):
    """Index of the last sample of ``column`` that equals ``largest``, moved to the vertex of a parabola.

    The parabola is the least-squares fit to the seven samples about it; a flat one moves nothing.
    """
    index = length - 1
    while index > 0 and z[2 * LANES * index + column] != largest:
        index -= 1
    slope, curvature = 0.0, 0.0
    for i in range(-3, 4):
        value = np.float64(z[2 * LANES * ((index + i) % length) + column])
        slope += i * value / 28.0
        curvature += (i * i - 4) * value / 84.0
    return index - slope / (2.0 * curvature) if curvature != 0.0 else np.float64(index)


@njit(cache=True)
def _correlate_lanes(k, references, n_rows, n_freq, rings, scratch):
    """Spectrum of the correlations of a block of lanes with reference k, into ``scratch.a``."""
    _correlate(references.packed[k], scratch.spectra, rings.first_row, n_rows, n_freq, scratch.a)
    for i in range(LANES):  # the particle's mean, which only frequency 0 meets
        offset = scratch.offset[i] * references.constants[k]
        scratch.a[i] -= offset
        scratch.a[LANES + i] -= offset


# --- the search


@njit(cache=True)
def _aligned(size):
    """``size`` float32 that begin on a cache line: vectors across two lines take up to half as long again."""
    buffer = np.zeros(size + LANES, np.float32)
    first = -(buffer.ctypes.data // 4) % LANES
    return buffer[first:first + size]


@njit(cache=True)
def _new_scratch(n, n_references, rings, shifts):
    """Buffers of one thread."""
    longest, n_samples, n_shifts = rings.lengths.max(), rings.x.size, shifts.nx * shifts.ny
    n_strips = (LANES - 1) // n_shifts + 2  # a block touches no more particles
    n_candidates = LANES * shifts.parts * shifts.parts * n_shifts
    # half a page further than a whole number of pages, or the passes of an FFT would wait for each other
    buffers = _aligned(4 * LANES * longest + 512)
    return Scratch(
        np.zeros((n_strips, n + 2, shifts.stride, strip_height(n, shifts), shifts.nx), np.float32),
        np.zeros((n_strips, n_samples), np.uint64),
        np.zeros((n_strips, n_samples), np.uint64),
        np.zeros((n_strips, n_samples), np.float32),
        np.zeros((n_strips, n_samples), np.float32),
        buffers[:2 * LANES * longest],
        buffers[2 * LANES * longest + 512:],
        _aligned(2 * LANES * rings.first_row[-1]),
        _aligned(2 * LANES),
        np.zeros((2, LANES)),
        _aligned(2 * LANES),
        np.zeros((n_candidates, n_references), np.float32),
        np.zeros(n_candidates, np.float32),
        np.zeros((2, n_candidates)),
        np.zeros(LANES, np.int64),
        np.zeros(LANES),
        np.zeros(LANES),
        np.zeros(n_references, np.bool_),
    )


@njit(cache=True)
def _place(candidate, first, count, shifts):
    """Particle of a candidate, indices of its shift, and whether that lies within the particle's own range."""
    q, n_shifts = shifts.parts, shifts.nx * shifts.ny
    p, part, shift = candidate // (n_shifts * q * q), candidate // n_shifts % (q * q), candidate % n_shifts
    ix, iy = part % q + q * (shift % shifts.nx), part // q + q * (shift // shifts.nx)
    return p, first[p, 0] + ix, first[p, 1] + iy, ix < count[p, 0] and iy < count[p, 1]


@njit(cache=True)
def _prepare(p, part, images, centres, first, count, rings, shifts, scratch):
    """Pixels and sample places of particle p, for one grid of shifts."""
    strip = p % scratch.strips.shape[0]
    spread_shifts(images[p], shifts, scratch.strips[strip])
    # a grid that begins beyond the particle's own range would lie outside the strips; none of it counts
    ix = first[p, 0] + min(part % shifts.parts, count[p, 0] - 1)
    iy = first[p, 1] + min(part // shifts.parts, count[p, 1] - 1)
    locate_samples(rings, shifts, images.shape[1], centres[p, 0] + ix * shifts.step, centres[p, 1] + iy * shifts.step,
                   scratch.base[strip], scratch.below[strip], scratch.u[strip], scratch.v[strip])


@njit(cache=True)
def _fill_block(block, n_particles, n_freq, rings, shifts, scratch):
    """Ring spectra, of each ring ``n_freq`` frequencies, and moments of a block of LANES shifts of one grid."""
    n_strips, columns = scratch.strips.shape[:2]
    n_shifts = shifts.nx * shifts.ny
    pixels = scratch.strips.reshape((n_strips, -1))
    column = np.uint64(pixels.shape[1] // columns)
    stop_particle = min(n_particles, -(-(block + 1) * LANES // n_shifts))
    scratch.moments[:] = 0.0
    start = 0
    for ring in range(rings.lengths.size):
        length = rings.lengths[ring]
        stop = start + length
        for p in range(block * LANES // n_shifts, stop_particle):
            strip, first_shift = p % n_strips, block * LANES - p * n_shifts
            first_lane = max(0, -first_shift)
            scratch.sums[:] = 0.0
            _sample_shifts(pixels[strip], column, scratch.base[strip, start:stop], scratch.below[strip, start:stop],
                           scratch.u[strip, start:stop], scratch.v[strip, start:stop],
                           np.uint64(max(0, first_shift)), np.uint64(first_lane), scratch.a, scratch.sums)
            _add_moments(scratch.sums, rings.weights[ring], first_lane, n_shifts - first_shift, scratch.moments)
        z = fft_lanes(scratch.a, scratch.b, length // 2, rings)
        _unpack(z, length, n_freq[ring], ring, rings, scratch.spectra)
        start = stop


@njit(cache=True)
def _normalise_lane(lane, candidate, rings, scratch):
    """From the moments of a lane, what makes a peak of its correlation; kept for the second look."""
    mean = scratch.moments[0, lane] / rings.total_weight
    variance = scratch.moments[1, lane] / rings.total_weight - mean * mean
    scratch.offset[lane] = 2.0 * mean
    scratch.scale[lane] = 0.5 / (rings.lengths[0] * np.sqrt(variance)) if variance > 0.0 else 0.0
    scratch.offset_scale[0, candidate], scratch.offset_scale[1, candidate] = scratch.offset[lane], scratch.scale[lane]


@njit(cache=True)
def _first_look(block, part, n_particles, first, count, references, rings, shifts, scratch):
    """Bounds of the peaks of one block of shifts with all references.

    Only the rows are taken in which the references have something (``References.kept``). What the others can add to
    a peak is bounded (Cauchy and Schwarz).
    """
    n_shifts = shifts.nx * shifts.ny
    _fill_block(block, n_particles, references.kept_of_ring, rings, shifts, scratch)
    n_lanes = min(LANES, n_particles * n_shifts - block * LANES)
    for lane in range(n_lanes):
        p, shift = (block * LANES + lane) // n_shifts, (block * LANES + lane) % n_shifts
        candidate = (p * shifts.parts * shifts.parts + part) * n_shifts + shift
        _normalise_lane(lane, candidate, rings, scratch)
        scratch.lanes[lane] = candidate
        scratch.promise[candidate] = -np.inf
    for k in range(references.constants.size):
        _correlate_lanes(k, references, references.kept, references.n_kept, rings, scratch)
        fft_largest(scratch.a, scratch.b, rings.lengths[0], rings, scratch.largest)
        for lane in range(n_lanes):
            candidate = scratch.lanes[lane]
            largest = scratch.largest[lane]
            if shifts.mirror:
                largest = max(largest, scratch.largest[LANES + lane])
            scratch.bounds[candidate, k] = scratch.scale[lane] * largest + references.lost[k]
            scratch.promise[candidate] = max(scratch.promise[candidate], scratch.bounds[candidate, k])
    for lane in range(n_lanes):
        if not _place(scratch.lanes[lane], first, count, shifts)[3]:
            scratch.promise[scratch.lanes[lane]] = -np.inf


@njit(cache=True)
def _choose_lanes(peak, scratch):
    """Fill the lanes with candidates that may exceed their particle's best peak, the most promising first.

    Returns how many lanes are filled. No candidate is chosen twice.
    """
    n_candidates = scratch.promise.size // LANES
    n_lanes, before = 0, -1
    while n_lanes > before:
        before = n_lanes
        for p in range(peak.size):
            promise = scratch.promise[p * n_candidates:(p + 1) * n_candidates]
            best = promise.argmax()
            if n_lanes < LANES and promise[best] > -np.inf and promise[best] >= peak[p]:
                promise[best] = -np.inf
                scratch.lanes[n_lanes] = p * n_candidates + best
                n_lanes += 1
    return n_lanes


@njit(cache=True)
def _fill_lanes(n_lanes, images, centres, first, count, rings, shifts, scratch):
    """Ring spectra of the candidates in ``scratch.lanes``, in full."""
    n, start = images.shape[1], 0
    for ring in range(rings.lengths.size):
        length = rings.lengths[ring]
        x, y = rings.x[start:start + length], rings.y[start:start + length]
        for lane in range(n_lanes):
            p, ix, iy, _ = _place(scratch.lanes[lane], first, count, shifts)
            _sample_alone(images[p].reshape(n * n), n, x, y, centres[p, 0] + ix * shifts.step,
                          centres[p, 1] + iy * shifts.step, np.uint64(lane), scratch.a)
        z = fft_lanes(scratch.a, scratch.b, length // 2, rings)
        _unpack(z, length, length // 2 + 1, ring, rings, scratch.spectra)
        start += length


@njit(cache=True)
def _second_look(n_lanes, images, centres, first, count, references, rings, shifts, scratch, found):
    """Compare the candidates in ``scratch.lanes`` in full with every reference that may be their particle's best."""
    _fill_lanes(n_lanes, images, centres, first, count, rings, shifts, scratch)
    for lane in range(n_lanes):
        scratch.offset[lane], scratch.scale[lane] = scratch.offset_scale[:, scratch.lanes[lane]]
    scratch.exact[:] = False
    while True:
        k = _most_promising(n_lanes, found.peak, scratch)
        if k < 0:
            return
        scratch.exact[k] = True
        _correlate_lanes(k, references, rings.n_rows, rings.n_rows.size, rings, scratch)
        z = fft_lanes(scratch.a, scratch.b, rings.lengths[0], rings)
        _largest(z, rings.lengths[0], scratch.largest)
        for lane in range(n_lanes):
            p, ix, iy, _ = _place(scratch.lanes[lane], first, count, shifts)
            mirror = shifts.mirror and scratch.largest[LANES + lane] > scratch.largest[lane]
            _keep_better(z, lane, mirror, rings.lengths[0], scratch.largest, scratch.scale[lane], p, k, ix, iy, found)


@njit(cache=True)
def _most_promising(n_lanes, peak, scratch):
    """The reference not yet looked at in full that may exceed a particle's best peak by most; -1 if none may."""
    n_candidates = scratch.promise.size // LANES
    best, margin = -1, 0.0
    for k in range(scratch.exact.size):
        if not scratch.exact[k]:
            for lane in range(n_lanes):
                bound, highest = scratch.bounds[scratch.lanes[lane], k], peak[scratch.lanes[lane] // n_candidates]
                if bound >= highest:
                    excess = bound - max(highest, 0.0)
                    if best < 0 or excess > margin:
                        best, margin = k, excess
    return best


@njit(cache=True)
def _keep_better(z, lane, mirror, length, largest, scale, p, k, ix, iy, found):
    """Take this candidate if its peak is the higher; of equal ones the later in the order (iy, ix, reference)."""
    column = LANES + lane if mirror else lane
    peak = scale * largest[column]
    later = (iy, ix, k) > (found.iy[p], found.ix[p], found.assign[p])
    if peak > found.peak[p] or (peak == found.peak[p] and later):
        found.peak[p] = peak
        found.assign[p] = k
        found.mirror[p] = mirror
        found.ix[p], found.iy[p] = ix, iy
        found.alpha[p] = 360.0 * refine_angle(z, column, length, largest[column]) / length % 360.0


@njit(cache=True)
def _search_group(images, centres, first, count, references, rings, shifts, scratch, found):
    """Best reference, shift, angle and mirror of at most LANES particles, into ``found``.

    A first look bounds the peaks of all candidates; a second one computes those that may be the highest. The result
    is that of computing all.
    """
    n_particles, n_shifts = images.shape[0], shifts.nx * shifts.ny
    for part in range(shifts.parts * shifts.parts):
        n_prepared = 0
        for block in range(-(-n_particles * n_shifts // LANES)):
            while n_prepared < n_particles and n_prepared * n_shifts < (block + 1) * LANES:
                _prepare(n_prepared, part, images, centres, first, count, rings, shifts, scratch)
                n_prepared += 1
            _first_look(block, part, n_particles, first, count, references, rings, shifts, scratch)
    found.peak[:] = -np.inf
    n_lanes = _choose_lanes(found.peak, scratch)
    while n_lanes > 0:
        _second_look(n_lanes, images, centres, first, count, references, rings, shifts, scratch, found)
        n_lanes = _choose_lanes(found.peak, scratch)


@njit(parallel=True, cache=True)
def search(images, centres, first, count, references, rings, shifts, n_chunks, found):
    """Multi-reference search of all particles (SPEC section 4), each by itself, in parallel.

    Parameters
    ----------
    images : (n_particles, n, n) float32
    centres : (n_particles, 2) float64, px
        x, y of the point the rings are sampled about at shift 0.
    first, count : (n_particles, 2) int64
        First shift index and number of shifts in x and y; ``step`` times the index is the shift in px.
    references : References
    n_chunks : int
        Pieces for the threads to share.
    found : Found
        Filled in.
    """
    n_particles = images.shape[0]
    n_groups = -(-n_particles // LANES)
    for chunk in prange(n_chunks):
        scratch = _new_scratch(images.shape[1], references.constants.size, rings, shifts)
        for group in range(chunk * n_groups // n_chunks, (chunk + 1) * n_groups // n_chunks):
            a, b = group * LANES, min((group + 1) * LANES, n_particles)
            mine = Found(found.peak[a:b], found.assign[a:b], found.alpha[a:b], found.mirror[a:b], found.ix[a:b],
                         found.iy[a:b])
            _search_group(images[a:b], centres[a:b], first[a:b], count[a:b], references, rings, shifts, scratch, mine)


# --- pixels


@njit(parallel=True, cache=True)
def describe(images, inside, mean, deviation, lowest, highest):
    """Mean and population standard deviation under ``inside``, and extremes of the whole image.

    Parameters
    ----------
    images : (n_images, n, n) float32
    inside : (n, n) bool
    mean, deviation, lowest, highest : (n_images,) float64
        Filled in. An image with a NaN or infinite pixel gets NaN as its lowest and highest.
    """
    for i in prange(images.shape[0]):
        image = images[i]
        total, squares, count = 0.0, 0.0, 0
        low, high = np.inf, -np.inf
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                value = np.float64(image[y, x])
                if not np.isfinite(value):
                    low, high = np.nan, np.nan
                low, high = min(low, value), max(high, value)
                if inside[y, x]:
                    total += value
                    count += 1
        average = total / count
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                if inside[y, x]:
                    squares += (image[y, x] - average) ** 2
        mean[i], deviation[i] = average, np.sqrt(squares / count)
        lowest[i], highest[i] = low, high


@njit(parallel=True, cache=True)
def subtract_and_divide(images, mean, deviation):
    """``(image - mean) / deviation`` in place, float64 arithmetic, (n_images, n, n) float32."""
    for i in prange(images.shape[0]):
        image = images[i]
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                image[y, x] = (image[y, x] - mean[i]) / deviation[i]


@njit(cache=True)
def quadratic(image, x, y):
    """The six-point quadratic formula (SPEC section 2) at a place inside the image; neighbours wrap around."""
    n = image.shape[0]
    i, j = int(x), int(y)
    u, v = x - i, y - j
    left, right = (i - 1 if i > 0 else n - 1), (i + 1 if i < n - 1 else 0)
    above, below = (j - 1 if j > 0 else n - 1), (j + 1 if j < n - 1 else 0)
    f0 = np.float64(image[j, i])
    a1 = image[j, right] - f0
    a2 = (a1 - f0 + image[j, left]) / 2.0
    b1 = image[below, i] - f0
    b2 = (b1 - f0 + image[above, i]) / 2.0
    m = image[below, right] - f0 - a1 - b1
    return f0 + u * (a1 + (u - 1.0) * a2 + v * m) + v * (b1 + (v - 1.0) * b2)


@njit(parallel=True, cache=True)
def transform(images, cosine, sine, sx, sy, mirror, moved):
    """Images moved by their poses: rotate, shift, then flip (SPEC section 2).

    A sample outside the image takes the pixel at the output's own place. The flip leaves column 0 of an even
    image where it is.

    Parameters
    ----------
    images : (n_images, n, n) float32
    cosine, sine : (n_images,) float64
        Of alpha.
    sx, sy : (n_images,) float64, px
    mirror : (n_images,) int32
    moved : (n_images, n, n) float32
        Filled in.
    """
    n = images.shape[1]
    c = n // 2
    for i in prange(images.shape[0]):
        image = images[i]
        for row in range(n):
            qy = row - c - sy[i]
            for column in range(n):
                qx = column - c - sx[i]
                x = cosine[i] * qx - sine[i] * qy + c
                y = sine[i] * qx + cosine[i] * qy + c
                inside = 0.0 <= x < n and 0.0 <= y < n
                value = quadratic(image, x, y) if inside else np.float64(image[row, column])
                target = 2 * c - column if mirror[i] else column
                moved[i, row, target if target < n else 0] = value


@njit(parallel=True, cache=True)
def add_to_classes(moved, assign, half, unit, sums):
    """Add images to their class and half in whole numbers of ``unit``, so that no order of adding matters.

    Parameters
    ----------
    moved : (n_images, n, n) float32
    assign, half : (n_images,) int
        Class, and 0 or 1 for the even or odd half.
    unit : float
        Worth of 1 in ``sums``.
    sums : (n_classes, 2, n, n) int64
    """
    for row in prange(moved.shape[1]):
        for i in range(moved.shape[0]):
            target, source = sums[assign[i], half[i], row], moved[i, row]
            for column in range(moved.shape[2]):
                target[column] += np.int64(np.rint(source[column] / unit))
