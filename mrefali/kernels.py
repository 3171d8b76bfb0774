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


#: What may be taken for granted of numbers; neither the order of a sum nor that a product may be fused into one. Where
#: it is free, the compiler chooses differently for the several vectors that a loop over lanes is made of where these
#: are short, and for a function alone and within its caller: the process that compiles takes the one, and those that
#: find both in the cache the other.
PLAIN_NUMBERS = {"nnan", "ninf", "nsz"}

#: Compiles a function over lanes, or along a row.
lane_njit = njit(fastmath=PLAIN_NUMBERS, cache=True, pipeline_class=_NoOverlap)

#: The same with products fused into sums, each of which must have one product only, so that there is no choice.
fused_lane_njit = njit(fastmath=PLAIN_NUMBERS | {"contract"}, cache=True, pipeline_class=_NoOverlap)

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


@njit(inline="always", fastmath=PLAIN_NUMBERS)
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


@fused_lane_njit
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
        if n_lanes < LANES:  # or the FFT of a ring would be that of the last one's FFT, and grow without end
            scratch.a[:length * LANES] = 0
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
    scratch.exact[:] = False
    while True:
        k = _most_promising(n_lanes, found.peak, scratch)
        if k < 0:
            return
        scratch.exact[k] = True
        _compare_lanes(k, n_lanes, first, count, references, rings, shifts, scratch, found)


@njit(cache=True)
def _compare_lanes(k, n_lanes, first, count, references, rings, shifts, scratch, found):
    """Correlate the candidates in ``scratch.lanes``, whose spectra are there in full, with reference k."""
    for lane in range(n_lanes):
        scratch.offset[lane], scratch.scale[lane] = scratch.offset_scale[:, scratch.lanes[lane]]
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
def _look_at_all(images, centres, first, count, references, rings, shifts, scratch):
    """First look at every candidate of at most LANES particles."""
    n_particles, n_shifts = images.shape[0], shifts.nx * shifts.ny
    for part in range(shifts.parts * shifts.parts):
        n_prepared = 0
        for block in range(-(-n_particles * n_shifts // LANES)):
            while n_prepared < n_particles and n_prepared * n_shifts < (block + 1) * LANES:
                _prepare(n_prepared, part, images, centres, first, count, rings, shifts, scratch)
                n_prepared += 1
            _first_look(block, part, n_particles, first, count, references, rings, shifts, scratch)


@njit(cache=True)
def _search_group(images, centres, first, count, references, rings, shifts, scratch, found):
    """Best reference, shift, angle and mirror of at most LANES particles, into ``found``.

    A first look bounds the peaks of all candidates; a second one computes those that may be the highest. The result
    is that of computing all.
    """
    _look_at_all(images, centres, first, count, references, rings, shifts, scratch)
    found.peak[:] = -np.inf
    n_lanes = _choose_lanes(found.peak, scratch)
    while n_lanes > 0:
        _second_look(n_lanes, images, centres, first, count, references, rings, shifts, scratch, found)
        n_lanes = _choose_lanes(found.peak, scratch)


@njit(cache=True)
def _search_group_each(images, centres, first, count, references, rings, shifts, scratch, found):
    """The same with each reference by itself; the arrays of ``found`` are (n_references, n_particles)."""
    _look_at_all(images, centres, first, count, references, rings, shifts, scratch)
    outside = scratch.promise == -np.inf
    for k in range(references.constants.size):
        alone = Found(found.peak[k], found.assign[k], found.alpha[k], found.mirror[k], found.ix[k], found.iy[k])
        alone.peak[:] = -np.inf
        for candidate in range(outside.size):
            scratch.promise[candidate] = -np.inf if outside[candidate] else scratch.bounds[candidate, k]
        n_lanes = _choose_lanes(alone.peak, scratch)
        while n_lanes > 0:
            _fill_lanes(n_lanes, images, centres, first, count, rings, shifts, scratch)
            _compare_lanes(k, n_lanes, first, count, references, rings, shifts, scratch, alone)
            n_lanes = _choose_lanes(alone.peak, scratch)


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


@njit(parallel=True, cache=True)
def search_each(images, centres, first, count, references, rings, shifts, n_chunks, found):
    """As :func:`search`, with each reference by itself; the arrays of ``found`` are (n_references, n_particles)."""
    n_particles = images.shape[0]
    n_groups = -(-n_particles // LANES)
    for chunk in prange(n_chunks):
        scratch = _new_scratch(images.shape[1], references.constants.size, rings, shifts)
        for group in range(chunk * n_groups // n_chunks, (chunk + 1) * n_groups // n_chunks):
            a, b = group * LANES, min((group + 1) * LANES, n_particles)
            mine = Found(found.peak[:, a:b], found.assign[:, a:b], found.alpha[:, a:b], found.mirror[:, a:b],
                         found.ix[:, a:b], found.iy[:, a:b])
            _search_group_each(images[a:b], centres[a:b], first[a:b], count[a:b], references, rings, shifts, scratch,
                               mine)


# --- classes of limited size

#: What it costs to move a particle from class a to class b, for all a and b; a cost is a whole number.
Moves = namedtuple("Moves", [
    "cheapest",  # (n_classes, n_classes) int64: of the cheapest move; NEVER where a has no particle
    "queue",  # (n_classes, n_classes, length) int32: particles of a, the cheapest to move last; some have left by now
    "n_queued",  # (n_classes, n_classes) int64
    "limit",  # (n_classes, n_classes) int64: particles of a that are not in the queue cost at least this
    "known",  # (n_classes,) bool: whether the queues of a were ever filled
])

NEVER = 1 << 60  # more than any path costs


@njit(cache=True)
def _cost(i, a, b, scores, per_unit):
    return np.int64(np.rint(scores[i, a] * per_unit)) - np.int64(np.rint(scores[i, b] * per_unit))


@njit(cache=True)
def _fill_queue(a, b, members, scores, per_unit, moves):
    """Queue those ``members`` of class ``a`` that are cheapest to move to ``b``, equal ones in order of index."""
    costs = np.empty(members.size, np.int64)
    for j in range(members.size):
        costs[j] = _cost(members[j], a, b, scores, per_unit)
    length = moves.queue.shape[2]
    if members.size > length:
        moves.limit[a, b] = np.partition(costs, length - 1)[length - 1]
        chosen = np.concatenate((np.flatnonzero(costs < moves.limit[a, b]),
                                 np.flatnonzero(costs == moves.limit[a, b])))[:length]
    else:
        moves.limit[a, b] = NEVER
        chosen = np.arange(members.size)
    order = np.argsort(costs[chosen], kind="mergesort")[::-1]
    moves.n_queued[a, b] = order.size
    for j in range(order.size):
        moves.queue[a, b, j] = members[chosen[order[j]]]


@njit(cache=True)
def _update_moves(a, scores, per_unit, assign, moves):
    """Bring the cheapest moves out of class ``a`` up to date."""
    members = np.empty(0, np.int64)
    for b in range(scores.shape[1]):
        n = moves.n_queued[a, b]
        while n > 0 and assign[moves.queue[a, b, n - 1]] != a:
            n -= 1
        moves.n_queued[a, b] = n
        if n == 0 and b != a and (moves.limit[a, b] < NEVER or not moves.known[a]):
            if members.size == 0:
                members = np.flatnonzero(assign == a)
            _fill_queue(a, b, members, scores, per_unit, moves)
        n = moves.n_queued[a, b]
        moves.cheapest[a, b] = _cost(moves.queue[a, b, n - 1], a, b, scores, per_unit) if n > 0 else NEVER
    moves.known[a] = True


@njit(cache=True)
def _enqueue(i, a, scores, per_unit, moves):
    """Let particle ``i``, new in class ``a``, take its place in those queues that it is cheap enough for."""
    length = moves.queue.shape[2]
    for b in range(scores.shape[1]):
        cost = _cost(i, a, b, scores, per_unit)
        if b == a or cost >= moves.limit[a, b]:
            continue
        queue, n = moves.queue[a, b], moves.n_queued[a, b]
        if n == length:
            moves.limit[a, b] = _cost(queue[0], a, b, scores, per_unit)
            queue[:-1] = queue[1:].copy()
            n -= 1
        at = n
        while at > 0 and _cost(queue[at - 1], a, b, scores, per_unit) < cost:
            queue[at] = queue[at - 1]
            at -= 1
        queue[at] = i
        moves.n_queued[a, b] = n + 1


@njit(cache=True)
def _cheapest_path(gives, takes, scores, per_unit, assign, moves):
    """Classes of the cheapest path from one that ``gives`` to one that ``takes``, last first (Bellman and Ford)."""
    n_classes = scores.shape[1]
    cost = np.where(gives, 0, NEVER)
    previous, changed = np.full(n_classes, -1), gives.copy()
    while changed.any():
        for a in range(n_classes):
            if not changed[a]:
                continue
            changed[a] = False
            if not moves.known[a]:
                _update_moves(a, scores, per_unit, assign, moves)
            for b in range(n_classes):
                if cost[a] + moves.cheapest[a, b] < cost[b]:
                    cost[b], previous[b] = cost[a] + moves.cheapest[a, b], a
                    changed[b] = not takes[b]  # where a particle can stay it goes no farther
    path = [np.argmin(np.where(takes, cost, NEVER))]
    while previous[path[-1]] >= 0:
        path.append(previous[path[-1]])
    return path


@njit(cache=True)
def assign_within(scores, fewest, most, per_unit, length, assign):
    """Move particles between classes until each has ``fewest`` to ``most``, at the least loss of scores in all.

    One after another, particles are moved along the cheapest path from a class that has too many to one that has
    room, one from each class on the path to the next: successive shortest paths, on the graph of the classes. Costs
    are whole numbers, so that no rounding makes a circle of moves seem a gain.

    Parameters
    ----------
    scores : (n_particles, n_classes) float32
    fewest, most : int
    per_unit : float64
        What makes of a score a whole number, when rounded, of at most 2**30 but for its sign.
    length : int
        Particles in a queue; matters to time and memory alone.
    assign : (n_particles,) int32
        The best class of each; changed.
    """
    n_classes = scores.shape[1]
    shape = (n_classes, n_classes)
    moves = Moves(np.full(shape, NEVER), np.empty((n_classes, n_classes, length), np.int32), np.zeros(shape, np.int64),
                  np.full(shape, NEVER), np.zeros(n_classes, np.bool_))
    counts = np.bincount(assign, minlength=n_classes)
    while counts.max() > most or counts.min() < fewest:
        if counts.max() > most:
            path = _cheapest_path(counts > most, counts < most, scores, per_unit, assign, moves)
        else:
            path = _cheapest_path(counts > fewest, counts < fewest, scores, per_unit, assign, moves)
        for step in range(len(path) - 1):
            b, a = path[step], path[step + 1]
            i = moves.queue[a, b, moves.n_queued[a, b] - 1]
            assign[i] = b
            if moves.known[b]:
                _enqueue(i, b, scores, per_unit, moves)
        counts[path[0]] += 1
        counts[path[-1]] -= 1
        for a in path:
            if moves.known[a]:
                _update_moves(a, scores, per_unit, assign, moves)


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


# --- band-limited images, read from a finer grid


#: Samples each way that a value between them is made of, and steps of the table of their weights.
TAPS, TABLE_STEPS = 8, 1024


@lane_njit
def fine_row(fine, width, x, y, dx, dy, count, weights, value):
    """Values of a periodic function at ``count`` places in a line.

    Parameters
    ----------
    fine : (width * width,) float32
        Samples, row after row: one period, and the first ``TAPS`` of it once more.
    x, y : float64
        The first place, in columns and rows; it takes the ``TAPS`` x ``TAPS`` samples from there on, whole numbers
        rounded down. Periods more or less make no difference.
    dx, dy : float64
        From one place to the next.
    weights : ((TABLE_STEPS + 1) * TAPS,) float32
        Of the samples each way, for each step of the place from one sample to the next; linear between steps.
    value : (at least count,) float32
        Filled in.
    """
    period, steps = np.float64(width - TAPS), np.float64(TABLE_STEPS)
    w = weights
    for i in range(np.uint64(count)):
        at_x, at_y = x + np.float64(i) * dx, y + np.float64(i) * dy
        at_x -= period * np.floor(at_x / period)  # up to the period itself, where that is rounded up to
        at_y -= period * np.floor(at_y / period)
        column, row = np.int64(at_x), np.int64(at_y)
        step_x, step_y = steps * (at_x - column), steps * (at_y - row)
        whole_x, whole_y = np.int64(step_x), np.int64(step_y)
        u, v = np.float32(step_x - whole_x), np.float32(step_y - whole_y)
        a, b = np.uint64(TAPS * whole_x), np.uint64(TAPS * whole_y)
        x0, x1 = w[a] + u * (w[a + 8] - w[a]), w[a + 1] + u * (w[a + 9] - w[a + 1])
        x2, x3 = w[a + 2] + u * (w[a + 10] - w[a + 2]), w[a + 3] + u * (w[a + 11] - w[a + 3])
        x4, x5 = w[a + 4] + u * (w[a + 12] - w[a + 4]), w[a + 5] + u * (w[a + 13] - w[a + 5])
        x6, x7 = w[a + 6] + u * (w[a + 14] - w[a + 6]), w[a + 7] + u * (w[a + 15] - w[a + 7])
        k = np.uint64(row * width + column)
        total = np.float32(0)
        for _ in range(np.uint64(TAPS)):
            total += (w[b] + v * (w[b + 8] - w[b])) * (
                x0 * fine[k] + x1 * fine[k + 1] + x2 * fine[k + 2] + x3 * fine[k + 3]
                + x4 * fine[k + 4] + x5 * fine[k + 5] + x6 * fine[k + 6] + x7 * fine[k + 7])
            b += np.uint64(1)
            k += np.uint64(width)
        value[i] = total


@njit(parallel=True, cache=True)
def read_turned(fine, first, step, weights, moved):
    """Images whose pixels are read at the places of a turned grid, see :func:`fine_row`.

    Parameters
    ----------
    fine : (n_images, m, m) float32
    first : (n_images, 2) float64
        Place of pixel (0, 0), x and y.
    step : (n_images, 2) float64
        From a pixel to the next of its row; to the next of its column it is as far at a right angle.
    weights : (TABLE_STEPS + 1, TAPS) float32
    moved : (n_images, n, n) float32
        Filled in.
    """
    n, width, table = moved.shape[1], fine.shape[1], weights.ravel()
    for line in prange(moved.shape[0] * n):  # not over images: of large ones there is one at a time
        i, row = line // n, line % n
        fine_row(fine[i].ravel(), width, first[i, 0] - row * step[i, 1], first[i, 1] + row * step[i, 0],
                 step[i, 0], step[i, 1], n, table, moved[i, row])


# --- continuous refinement: Gauss and Newton on the correlation, the reference being a cubic spline


#: A refinement ends when a step moves no pixel of the disc by this many px along x or y, or after so many evaluations.
SETTLED_PX, EVALUATIONS = 0.02, 16

#: Curvature is learned from a step along which the gradient changes by at least this share of what was expected: a
#: smaller one would ask for a next step of more than ten times the length that Gauss and Newton give it.
LEAST_CURVATURE = 0.1


@lane_njit
def spline_row(coefficients, width, x, y, dx, dy, count, value, slope_x, slope_y):
    """Value and slopes of a cubic spline at ``count`` places in a line.

    Parameters
    ----------
    coefficients : (height * width,) float32
        B-spline coefficients, row after row; the places are at least 1 px inside their edges, 2 px on the far ones.
    x, y : float32, px
        The first place, in columns and rows of the coefficients.
    dx, dy : float32, px
        From one place to the next.
    value, slope_x, slope_y : (at least count,) float32
        Filled in.
    """
    sixth, half = np.float32(1 / 6), np.float32(0.5)
    one, two, three, four = np.float32(1), np.float32(2), np.float32(3), np.float32(4)
    for i in range(np.uint64(count)):
        at_x, at_y = x + np.float32(i) * dx, y + np.float32(i) * dy
        column, row = np.int32(at_x), np.int32(at_y)
        u, v = at_x - np.float32(column), at_y - np.float32(row)
        a, b = one - u, one - v
        x0, x3 = a * a * a * sixth, u * u * u * sixth
        x1 = (three * u * u * (u - two) + four) * sixth
        x2 = one - x0 - x1 - x3
        s0, s3 = -half * a * a, half * u * u
        s1 = half * u * (three * u - four)
        s2 = -s0 - s1 - s3
        y0, y3 = b * b * b * sixth, v * v * v * sixth
        y1 = (three * v * v * (v - two) + four) * sixth
        y2 = one - y0 - y1 - y3
        t0, t3 = -half * b * b, half * v * v
        t1 = half * v * (three * v - four)
        t2 = -t0 - t1 - t3
        k = np.uint64((row - 1) * width + column - 1)
        k1, k2, k3 = k + width, k + np.uint64(2 * width), k + np.uint64(3 * width)
        c = coefficients
        p0 = x0 * c[k] + x1 * c[k + 1] + x2 * c[k + 2] + x3 * c[k + 3]
        p1 = x0 * c[k1] + x1 * c[k1 + 1] + x2 * c[k1 + 2] + x3 * c[k1 + 3]
        p2 = x0 * c[k2] + x1 * c[k2 + 1] + x2 * c[k2 + 2] + x3 * c[k2 + 3]
        p3 = x0 * c[k3] + x1 * c[k3 + 1] + x2 * c[k3 + 2] + x3 * c[k3 + 3]
        q0 = s0 * c[k] + s1 * c[k + 1] + s2 * c[k + 2] + s3 * c[k + 3]
        q1 = s0 * c[k1] + s1 * c[k1 + 1] + s2 * c[k1 + 2] + s3 * c[k1 + 3]
        q2 = s0 * c[k2] + s1 * c[k2 + 1] + s2 * c[k2 + 2] + s3 * c[k2 + 3]
        q3 = s0 * c[k3] + s1 * c[k3 + 1] + s2 * c[k3 + 2] + s3 * c[k3 + 3]
        value[i] = y0 * p0 + y1 * p1 + y2 * p2 + y3 * p3
        slope_x[i] = y0 * q0 + y1 * q1 + y2 * q2 + y3 * q3
        slope_y[i] = t0 * p0 + t1 * p1 + t2 * p2 + t3 * p3


#: Sums that :func:`add_row_sums` takes of a row.
N_SUMS = 21


@lane_njit
def add_row_sums(g, f, fx, fy, x, y, dx, dy, r_sq, r_sq_slope, least_sq, count, lanes, sums):
    """Add to ``sums`` (N_SUMS,) float64 one row: pixels; g, f, p, q, a and all their products, two and two.

    p and q are the slopes of the reference, a = p y - q x its change with the angle; pixel i lies at
    (x + i dx, y + i dy) of the reference, and at the squared distance r_sq + i (r_sq_slope + i) from the middle of the
    disc, which takes those from ``least_sq`` on. All numbers are float32. Each column of ``lanes``
    (N_SUMS * LANES,) is the sums of every LANES-th pixel, side by side as in the search.
    """
    zero = np.float32(0)
    lanes[:] = 0
    for start in range(np.uint64(0), np.uint64(count), np.uint64(LANES)):
        g_from, f_from, fx_from, fy_from = g[start:], f[start:], fx[start:], fy[start:]
        for i in range(min(np.uint64(LANES), np.uint64(count) - start)):
            at = np.float32(start + i)
            w = np.float32(1) if r_sq + at * (r_sq_slope + at) >= least_sq else zero
            h, e, p, q = w * g_from[i], w * f_from[i], w * fx_from[i], w * fy_from[i]
            a = p * (y + at * dy) - q * (x + at * dx)
            lanes[i] += w
            lanes[LANES + i] += h
            lanes[2 * LANES + i] += e
            lanes[3 * LANES + i] += p
            lanes[4 * LANES + i] += q
            lanes[5 * LANES + i] += a
            lanes[6 * LANES + i] += h * h
            lanes[7 * LANES + i] += h * e
            lanes[8 * LANES + i] += h * p
            lanes[9 * LANES + i] += h * q
            lanes[10 * LANES + i] += h * a
            lanes[11 * LANES + i] += e * e
            lanes[12 * LANES + i] += e * p
            lanes[13 * LANES + i] += e * q
            lanes[14 * LANES + i] += e * a
            lanes[15 * LANES + i] += p * p
            lanes[16 * LANES + i] += p * q
            lanes[17 * LANES + i] += p * a
            lanes[18 * LANES + i] += q * q
            lanes[19 * LANES + i] += q * a
            lanes[20 * LANES + i] += a * a
    for k in range(N_SUMS):
        total = 0.0
        for i in range(LANES):
            total += np.float64(lanes[LANES * k + i])
        sums[k] += total


@njit(cache=True)
def _disc_sums(image, matrix, middle, inner_radius, outer_radius, coefficients, margin, rows, lanes, sums):
    """Sums of :func:`add_row_sums` over the pixels of the particle that lie in the disc about ``middle``.

    ``matrix`` (2, 3) carries a pixel, from the centre, onto the reference.
    """
    n = image.shape[0]
    c, width = n // 2, n + 2 * margin
    sums[:] = 0.0
    for j in range(max(0, int(np.ceil(c + middle[1] - outer_radius))),
                   min(n - 1, int(np.floor(c + middle[1] + outer_radius))) + 1):
        dy = j - c - middle[1]
        chord = np.sqrt(max(0.0, outer_radius * outer_radius - dy * dy))
        first = max(0, int(np.ceil(c + middle[0] - chord)))
        count = min(n - 1, int(np.floor(c + middle[0] + chord))) + 1 - first
        if count <= 0:
            continue
        x, y = first - c, j - c
        u = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]
        v = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
        du, dv = np.float32(matrix[0, 0]), np.float32(matrix[1, 0])
        spline_row(coefficients, width, np.float32(u + c + margin), np.float32(v + c + margin), du, dv, count,
                   rows[0], rows[1], rows[2])
        dx = x - middle[0]
        add_row_sums(image[j, first:], rows[0], rows[1], rows[2], np.float32(u), np.float32(v), du, dv,
                     np.float32(dx * dx + dy * dy), np.float32(2 * dx), np.float32(inner_radius * inner_radius), count,
                     lanes, sums)


@njit(cache=True)
def _normal_equations(sums, matrix, gradient):
    """Matrix and gradient of Gauss and Newton for a step (x, y px, radians), filled in, and the correlation.

    The particle is the reference, times a height, plus a constant, both fitted; the gradient is that of half the
    variance so explained. Both are 0 where the sums do not tell a step: a particle or a reference without contrast, or
    one that is the other's negative.

    Returns
    -------
    correlation : float
        -2 where there is none.
    deviation : float
        Of the reference.
    """
    n = max(sums[0], 1.0)
    mean_g, mean_f, means = sums[1] / n, sums[2] / n, sums[3:6] / n
    gg, gf, ff = sums[6] / n - mean_g**2, sums[7] / n - mean_g * mean_f, sums[11] / n - mean_f**2
    matrix[:], gradient[:] = 0.0, 0.0
    if not (gg > 0.0 and ff > 0.0):
        return -2.0, 0.0
    height = gf / ff
    if height > 0.0:
        fd = sums[12:15] / n - mean_f * means
        gradient[:] = height * (sums[8:11] / n - mean_g * means - height * fd)
        k = 15
        for i in range(3):
            for j in range(i, 3):
                matrix[i, j] = matrix[j, i] = height**2 * (sums[k] / n - means[i] * means[j] - fd[i] * fd[j] / ff)
                k += 1
    return gf / np.sqrt(gg * ff), np.sqrt(ff)


@njit(cache=True)
def _solve(m, gradient, step):
    """``step`` (3,) such that ``m`` (3, 3) times it is ``gradient``; 0 and False unless ``m`` is positive definite."""
    first = np.array([m[1, 1] * m[2, 2] - m[1, 2] ** 2, m[0, 2] * m[1, 2] - m[0, 1] * m[2, 2],
                      m[0, 1] * m[1, 2] - m[0, 2] * m[1, 1]])
    minor, determinant = m[0, 0] * m[1, 1] - m[0, 1] ** 2, (m[0] * first).sum()
    if not (m[0, 0] > 0.0 and minor > 0.0 and determinant > 1e-9 * m[0, 0] * m[1, 1] * m[2, 2]):
        step[:] = 0.0
        return False
    corner = m[0, 1] * m[0, 2] - m[0, 0] * m[1, 2]
    step[0] = (first * gradient).sum() / determinant
    step[1] = (first[1] * gradient[0] + (m[0, 0] * m[2, 2] - m[0, 2] ** 2) * gradient[1] + corner * gradient[2]
               ) / determinant
    step[2] = (first[2] * gradient[0] + corner * gradient[1] + minor * gradient[2]) / determinant
    return True


@njit(cache=True)
def _learn(curvature, matrix, step, change):
    """Add to ``curvature`` (3, 3), which Gauss and Newton's ``matrix`` lacks, what a ``step`` tells.

    ``change`` is by how much the gradient fell along it. The sum of both matrices then gives just that change, and
    stays positive definite (Broyden, Fletcher, Goldfarb and Shanno).
    """
    expected = np.zeros(3)
    for i in range(3):
        for j in range(3):
            expected[i] += (matrix[i, j] + curvature[i, j]) * step[j]
    before, after = (expected * step).sum(), (change * step).sum()
    if before > 0.0 and after > LEAST_CURVATURE * before:
        for i in range(3):
            for j in range(3):
                curvature[i, j] += change[i] * change[j] / after - expected[i] * expected[j] / before


@njit(cache=True)
def _moved(matrix, step, moved):
    """``matrix`` (2, 3), then a rotation and a shift by ``step``, into ``moved``."""
    c, s = np.cos(step[2]), np.sin(step[2])
    moved[0] = c * matrix[0] + s * matrix[1]
    moved[1] = c * matrix[1] - s * matrix[0]
    moved[0, 2] += step[0]
    moved[1, 2] += step[1]


@njit(cache=True)
def _largest_move(step, radius):
    return max(abs(step[0]), abs(step[1]), radius * abs(step[2]))


@njit(cache=True)
def _sharpen_one(image, matrix, inner_radius, outer_radius, farthest, coefficients, margin, rows):
    """As :func:`sharpen` for one particle: ``matrix`` (2, 3) in place; returns the peak."""
    first, second = matrix[0].copy(), matrix[1].copy()
    middle = np.array([-(first[i] * first[2] + second[i] * second[2]) for i in range(2)])
    lanes, sums = np.empty(N_SUMS * LANES, np.float32), np.empty(N_SUMS)
    trial, normal, curvature = matrix.copy(), np.empty((3, 3)), np.zeros((3, 3))
    gradient, best_gradient, step, way = np.empty(3), np.zeros(3), np.zeros(3), np.zeros(3)
    best, peak = -2.0, 0.0
    for _ in range(EVALUATIONS):
        _disc_sums(image, trial, middle, inner_radius, outer_radius, coefficients, margin, rows, lanes, sums)
        correlation, deviation = _normal_equations(sums, normal, gradient)
        if correlation > best:
            best, peak = correlation, correlation * deviation * sums[0]
            matrix[:] = trial
            way += step
            _learn(curvature, normal, step, best_gradient - gradient)
            best_gradient[:] = gradient
            if not _solve(normal + curvature, gradient, step):
                curvature[:] = 0.0
                _solve(normal, gradient, step)
        else:  # too far: half the way from the best place yet
            step *= 0.5
        if _largest_move(way + step, outer_radius) > farthest:
            break
        _moved(matrix, step, trial)
        if _largest_move(step, outer_radius) < SETTLED_PX:
            matrix[:] = trial
            break
    return peak


@njit(parallel=True, cache=True)
def sharpen(images, matrices, assign, inner_radius, outer_radius, farthest, coefficients, margin, peak):
    """Poses about the present ones at which particles correlate best with their references, each by itself.

    The correlation is the normalised one over the pixels that lie, in the present pose, at least ``inner_radius`` and
    at most ``outer_radius`` from the middle of the reference. A step that lowers it is halved. In noise a step of
    Gauss and Newton leaves a share of the way, up to nine tenths; what the gradient did along it corrects the next.

    Parameters
    ----------
    images : (n_particles, n, n) float32
    matrices : (n_particles, 2, 3) float64
        Carry x, y of a particle onto the reference, both from the centre pixel; refined in place.
    assign : (n_particles,) int
        The reference of each.
    inner_radius, outer_radius : float, px
    farthest : float, px
        A step that leads shift, or the rim of the disc, farther than this from the present pose is not taken.
    coefficients : (n_references, (n + 2 margin)**2) float32
        Of cubic B-splines, the references having ``margin`` px round them: more than twice ``farthest``, and 2.
    peak : (n_particles,) float64
        Filled in: sum over the disc of reference times particle, that being of mean 0 and deviation 1 there.
    """
    for i in prange(images.shape[0]):
        rows = np.empty((3, images.shape[2]), np.float32)
        peak[i] = _sharpen_one(images[i], matrices[i], inner_radius, outer_radius, farthest, coefficients[assign[i]],
                               margin, rows)
