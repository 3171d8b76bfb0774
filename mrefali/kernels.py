"""Every ``@njit`` function and nothing else. Imports nothing of ours; knows no file, no unit and no object.

The search runs over *lanes*: one lane is one (particle, shift) pair, ``LANES`` of them side by side in the last
axis of every buffer, so that each step (bilinear samples, ring FFT, products, inverse FFT, peak) is the same
arithmetic on ``LANES`` neighbouring numbers. A lane never meets another, so what a particle gets cannot depend on
the number of threads or on what stands beside it.

Two things keep the inner loops in vector registers and look odd otherwise: loop lengths over lanes are literals,
and arrays are sliced before an inner loop (an index that might be negative would be checked at each step).
"""

from collections import namedtuple

import numpy as np
from numba import njit, prange

LANES = 16
UNROLL = 8  # rings that one pass of the product takes together; ring counts are padded to a multiple

#: Tables of the rings, outermost first, that depend on box and search only (built by ``search.py``).
Rings = namedtuple("Rings", [
    "x", "y",  # (n_samples,) float64: samples relative to the centre, px, ring after ring
    "lengths",  # (n_rings,) int64: samples on each ring, a power of two
    "weights",  # (n_rings,) float64: 2 pi r / L, what one sample counts in mean and variance
    "first_row",  # (n_freq + 1,) int64: where the rows (rings) of each angular frequency begin; padded to UNROLL
    "twiddles",  # float32: factors of the radix-4 passes, size after size
    "first_twiddle",  # (20,) int64: where those of size 2**i begin
    "phases",  # (Lmax / 2, 2) float32: cos and sin of 2 pi k / Lmax
])

#: The translations tried (built by ``search.py``): a step of p/q px is q x q grids of whole strides of p px.
Shifts = namedtuple("Shifts", [
    "step",  # float: px
    "stride",  # p
    "parts",  # q
    "nx", "ny",  # shifts of one grid, per axis
])

#: The references (built by ``search.py``).
References = namedtuple("References", [
    "packed",  # (n_references, 2 * rows) float32: weighted ring spectra, see _correlate
    "constants",  # (n_references,) float64: what an image of ones adds at frequency 0
    "kept",  # (n_freq,) int64: rows of each frequency, outermost rings first, that a first look takes
    "n_kept",  # frequencies with such rows
    "lost",  # (n_references,) float64: bound on what the other rows add to any peak; all 0 if all are kept
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

#: Buffers of one thread.
Scratch = namedtuple("Scratch", ["strips", "base", "below", "u", "v", "a", "b", "spectra", "ring_moments", "moments",
                                 "largest", "bounds", "exact"])


# --- FFT across lanes: element e of a buffer is 2 * LANES floats, real parts, then imaginary parts


@njit(inline="always", fastmath=True)
def _radix4(x, y, n, s, w):
    """One radix-4 pass (Stockham, decimation in frequency) of length n and stride s, from x to y."""
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


@njit(inline="always", fastmath=True)
def _radix2(x, y, s):
    """The last pass, where the length is an odd power of two."""
    for q in range(s):
        a = 2 * LANES * q
        b = a + 2 * LANES * s
        for i in range(2 * LANES):
            y[a + i], y[b + i] = x[a + i] + x[b + i], x[a + i] - x[b + i]


@njit(fastmath=True, cache=True)
def _fft4(a, b, w):
    _radix4(a, b, 4, 1, w)
    return b


@njit(fastmath=True, cache=True)
def _fft8(a, b, w):
    _radix4(a, b, 8, 1, w)
    _radix2(b, a, 4)
    return a


@njit(fastmath=True, cache=True)
def _fft16(a, b, w):
    _radix4(a, b, 16, 1, w)
    _radix4(b, a, 4, 4, w[24:])
    return a


@njit(fastmath=True, cache=True)
def _fft32(a, b, w):
    _radix4(a, b, 32, 1, w)
    _radix4(b, a, 8, 4, w[48:])
    _radix2(a, b, 16)
    return b


@njit(fastmath=True, cache=True)
def _fft64(a, b, w):
    _radix4(a, b, 64, 1, w)
    _radix4(b, a, 16, 4, w[96:])
    _radix4(a, b, 4, 16, w[120:])
    return b


@njit(fastmath=True, cache=True)
def _fft128(a, b, w):
    _radix4(a, b, 128, 1, w)
    _radix4(b, a, 32, 4, w[192:])
    _radix4(a, b, 8, 16, w[240:])
    _radix2(b, a, 64)
    return a


@njit(fastmath=True, cache=True)
def _fft256(a, b, w):
    _radix4(a, b, 256, 1, w)
    _radix4(b, a, 64, 4, w[384:])
    _radix4(a, b, 16, 16, w[480:])
    _radix4(b, a, 4, 64, w[504:])
    return a


@njit(fastmath=True, cache=True)
def _fft512(a, b, w):
    _radix4(a, b, 512, 1, w)
    _radix4(b, a, 128, 4, w[768:])
    _radix4(a, b, 32, 16, w[960:])
    _radix4(b, a, 8, 64, w[1008:])
    _radix2(a, b, 256)
    return b


@njit(fastmath=True, cache=True)
def _fft1024(a, b, w):
    _radix4(a, b, 1024, 1, w)
    _radix4(b, a, 256, 4, w[1536:])
    _radix4(a, b, 64, 16, w[1920:])
    _radix4(b, a, 16, 64, w[2016:])
    _radix4(a, b, 4, 256, w[2040:])
    return b


@njit(fastmath=True, cache=True)
def _fft_large(a, b, w, n):
    """Lengths that literals do not cover (boxes above 326 px): the same passes, some four times slower."""
    s = 1
    while n >= 4:
        _radix4(a, b, n, s, w)
        w = w[6 * (n // 4):]
        a, b = b, a
        n //= 4
        s *= 4
    if n == 2:
        _radix2(a, b, s)
        a, b = b, a
    return a


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
    e = 0
    while 1 << e < n:
        e += 1
    w = rings.twiddles[rings.first_twiddle[e]:]
    if n == 4:
        return _fft4(a, b, w)
    if n == 8:
        return _fft8(a, b, w)
    if n == 16:
        return _fft16(a, b, w)
    if n == 32:
        return _fft32(a, b, w)
    if n == 64:
        return _fft64(a, b, w)
    if n == 128:
        return _fft128(a, b, w)
    if n == 256:
        return _fft256(a, b, w)
    if n == 512:
        return _fft512(a, b, w)
    if n == 1024:
        return _fft1024(a, b, w)
    return _fft_large(a, b, w, n)


# --- polar samples


@njit(cache=True)
def spread_shifts(image, shifts, strips):
    """Copy ``image`` so that the pixels under one sample at all shifts lie side by side.

    ``strips[x, y % p, y // p, i] = image[y, x + p i]``, 0 beyond the edge, p the stride: in the flattened array a
    shift down by p is as far as ``nx`` shifts to the right, and lane ``iy * nx + ix`` lies that far from lane 0.
    """
    n, p, nx = image.shape[0], shifts.stride, shifts.nx
    for y in range(n):
        row = image[y]
        target = strips[:, y % p, y // p]
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
        base[s] = i * column + row_offset[j]
        below[s] = i * column + row_offset[j + 1]


@njit(fastmath=True, cache=True)
def _sample_16(pixels, column, base, below, u, v, lane, out):
    """LANES neighbouring shifts, the first of them ``lane``, of one ring's samples, into ``out`` (samples, LANES)."""
    one = np.float32(1.0)
    n_lanes = np.uint64(out.shape[1])  # a literal here would be unrolled instead of vectorised
    for s in range(base.size):
        w11 = u[s] * v[s]
        w10, w01 = v[s] - w11, u[s] - w11
        w00 = one - u[s] - w10
        a, c = base[s] + lane, below[s] + lane
        b, d = a + column, c + column
        target = out[s]
        for i in range(n_lanes):
            target[i] = w00 * pixels[a + i] + w01 * pixels[b + i] + w10 * pixels[c + i] + w11 * pixels[d + i]


@njit(cache=True)
def _merge_lanes(source, first_lane, out):
    """Lanes 0, 1, ... of ``source`` into the lanes from ``first_lane`` on of ``out`` (samples, LANES).

    ``source`` is flat and begins LANES before its first row, so that no index falls below 0.
    """
    n_lanes = np.uint64(out.shape[1])
    for s in range(out.shape[0]):
        row = np.uint64((s + 1) * LANES) - first_lane
        target = out[s]
        for i in range(n_lanes):
            target[i] = source[row + i] if i >= first_lane else target[i]


@njit(fastmath=True, cache=True)
def _sample_few(pixels, column, base, below, u, v, shift, first_lane, stop_lane, out):
    """Shifts from ``shift`` on into the lanes from ``first_lane`` to ``stop_lane``, where they are only a few."""
    one = np.float32(1.0)
    for s in range(base.size):
        w11 = u[s] * v[s]
        w10, w01 = v[s] - w11, u[s] - w11
        w00 = one - u[s] - w10
        a, b = base[s] + shift, below[s] + shift
        for i in range(stop_lane - first_lane):
            out[s, first_lane + i] = (w00 * pixels[a + i] + w01 * pixels[a + column + i]
                                      + w10 * pixels[b + i] + w11 * pixels[b + column + i])


@njit(fastmath=True, cache=True)
def _add_moments(samples, length, weight, ring_moments, moments):
    """Add the weighted sum and sum of squares of one ring's samples to ``moments`` (2, LANES) float64.

    ``ring_moments`` (2, LANES) float32 takes those of the ring alone.
    """
    ring_moments[:] = 0.0
    first, second = ring_moments[0], ring_moments[1]
    for s in range(0, length, 8):
        x = samples[s * LANES:(s + 8) * LANES]
        for i in range(LANES):
            total, squares = first[i], second[i]
            for j in range(0, 8, 4):  # in fours, so that one addition need not wait for the last
                a, b, c, d = x[j * LANES + i], x[(j + 1) * LANES + i], x[(j + 2) * LANES + i], x[(j + 3) * LANES + i]
                total += (a + b) + (c + d)
                squares += (a * a + b * b) + (c * c + d * d)
            first[i], second[i] = total, squares
    for i in range(LANES):
        moments[0, i] += weight * first[i]
        moments[1, i] += weight * second[i]


@njit(fastmath=True, cache=True)
def _store_spectrum(z, length, ring, rings, spectra):
    """Unpack the half-length FFT ``z`` of one real ring into the rows of ``spectra``, as twice the spectrum.

    Row ``first_row[k] + ring`` holds the real parts of frequency k in all lanes, then the imaginary parts.
    """
    half = length // 2
    stride = 2 * rings.phases.shape[0] // length
    for k in range(half // 2 + 1):
        c, s = rings.phases[k * stride, 0], rings.phases[k * stride, 1]
        a = 2 * LANES * k
        b = 2 * LANES * ((half - k) % half)
        za, zb = z[a:a + 2 * LANES], z[b:b + 2 * LANES]
        row = 2 * LANES * (rings.first_row[k] + ring)
        mirror_row = 2 * LANES * (rings.first_row[half - k] + ring)
        low, high = spectra[row:row + 2 * LANES], spectra[mirror_row:mirror_row + 2 * LANES]
        for i in range(LANES):
            j = LANES + i
            even_r, even_i = za[i] + zb[i], za[j] - zb[j]
            odd_r, odd_i = za[j] + zb[j], zb[i] - za[i]
            turned_r, turned_i = c * odd_r + s * odd_i, c * odd_i - s * odd_r
            low[i], low[j] = even_r + turned_r, even_i + turned_i
            high[i], high[j] = even_r - turned_r, turned_i - even_i


# --- correlation


@njit(fastmath=True, cache=True)
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


@njit(fastmath=True, cache=True)
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


# --- the search


@njit(cache=True)
def _new_scratch(n, n_slots, n_references, rings, shifts):
    """Buffers of one thread."""
    longest = rings.lengths.max()
    n_samples = rings.x.size
    return Scratch(
        np.zeros((n_slots, n + 1, shifts.stride, strip_height(n, shifts), shifts.nx), np.float32),
        np.zeros((n_slots, n_samples), np.uint64),
        np.zeros((n_slots, n_samples), np.uint64),
        np.zeros((n_slots, n_samples), np.float32),
        np.zeros((n_slots, n_samples), np.float32),
        np.zeros(2 * LANES * longest, np.float32),
        np.zeros(2 * LANES * longest, np.float32),
        np.zeros(2 * LANES * rings.first_row[-1], np.float32),
        np.zeros((2, LANES), np.float32),
        np.zeros((2, LANES)),
        np.zeros(2 * LANES, np.float32),
        np.zeros((n_references, LANES)),
        np.zeros(n_references, np.bool_),
    )


@njit(cache=True)
def particles_together(n_shifts):
    """How many particles share their blocks of lanes, so that not more than one lane in fifteen is idle."""
    for n_slots in range(1, LANES):
        idle = -n_slots * n_shifts % LANES
        if 15 * idle <= n_slots * n_shifts + idle:
            return n_slots
    return LANES


@njit(cache=True)
def _fill_block(block, rings, shifts, scratch):
    """Ring spectra and moments of one block of LANES (particle, shift) pairs."""
    n_slots, columns = scratch.strips.shape[:2]
    n_shifts = shifts.nx * shifts.ny
    pixels = scratch.strips.reshape((n_slots, -1))
    column = np.uint64(pixels.shape[1] // columns)
    first_slot = block * LANES // n_shifts
    stop_slot = min(n_slots, -(-(block + 1) * LANES // n_shifts))
    scratch.moments[:] = 0.0
    start = 0
    for ring in range(rings.lengths.size):
        length = rings.lengths[ring]
        stop = start + length
        samples = scratch.a[:LANES * length].reshape((length, LANES))
        if stop_slot == n_slots:
            samples[:] = 0.0  # lanes after the last particle must hold numbers
        for slot in range(first_slot, stop_slot):
            base, below = scratch.base[slot, start:stop], scratch.below[slot, start:stop]
            u, v = scratch.u[slot, start:stop], scratch.v[slot, start:stop]
            lane = max(0, slot * n_shifts - block * LANES)
            shift = np.uint64(max(0, block * LANES - slot * n_shifts))
            stop_lane = min(LANES, (slot + 1) * n_shifts - block * LANES)
            if stop_lane - lane < LANES // 2:
                _sample_few(pixels[slot], column, base, below, u, v, shift, np.uint64(lane), np.uint64(stop_lane),
                            samples)
            elif lane == 0:
                _sample_16(pixels[slot], column, base, below, u, v, shift, samples)
            else:
                apart = scratch.b[LANES:LANES * (length + 1)].reshape((length, LANES))
                _sample_16(pixels[slot], column, base, below, u, v, shift, apart)
                _merge_lanes(scratch.b, np.uint64(lane), samples)
        _add_moments(scratch.a, length, rings.weights[ring], scratch.ring_moments, scratch.moments)
        z = fft_lanes(scratch.a, scratch.b, length // 2, rings)
        _store_spectrum(z, length, ring, rings, scratch.spectra)
        start = stop


@njit(cache=True)
def _peaks(k, references, n_rows, n_freq, total_weight, rings, scratch):
    """Correlation of a block with reference k at all angles; its largest values go into ``scratch.largest``."""
    longest = rings.lengths[0]
    _correlate(references.packed[k], scratch.spectra, rings.first_row, n_rows, n_freq, scratch.a)
    for i in range(LANES):  # the particle's mean, which only frequency 0 meets
        offset = 2.0 * scratch.moments[0, i] / total_weight * references.constants[k]
        scratch.a[i] -= offset
        scratch.a[LANES + i] -= offset
    z = fft_lanes(scratch.a, scratch.b, longest, rings)
    _largest(z, longest, scratch.largest)
    return z


@njit(cache=True)
def _search_group(slots, images, centres, first, count, references, rings, shifts, scratch, found):
    """Best reference, shift, angle and mirror of each particle in ``slots``, into ``found``."""
    n_shifts = shifts.nx * shifts.ny
    for slot in range(slots.size):
        spread_shifts(images[slots[slot]], shifts, scratch.strips[slot])
        found.peak[slots[slot]] = -np.inf
    for part in range(shifts.parts * shifts.parts):
        part_y, part_x = part // shifts.parts, part % shifts.parts
        for slot in range(slots.size):
            p = slots[slot]
            # a grid that begins beyond the particle's own range would lie outside the strips; none of it counts
            ix, iy = first[p, 0] + min(part_x, count[p, 0] - 1), first[p, 1] + min(part_y, count[p, 1] - 1)
            locate_samples(rings, shifts, images.shape[1], centres[p, 0] + ix * shifts.step,
                           centres[p, 1] + iy * shifts.step,
                           scratch.base[slot], scratch.below[slot], scratch.u[slot], scratch.v[slot])
        for block in range(-(-slots.size * n_shifts // LANES)):
            _fill_block(block, rings, shifts, scratch)
            _search_block(block, part_x, part_y, slots, first, count, references, rings, shifts, scratch, found)


@njit(cache=True)
def _search_block(block, part_x, part_y, slots, first, count, references, rings, shifts, scratch, found):
    """Compare a block of lanes with all references.

    A first look takes only the rows in which the references have something (``References.kept``). What the others
    can add to a peak is bounded (Cauchy and Schwarz), so a reference is looked at in full where a lane might still
    exceed the best peak its particle has, the most promising first; the result is that of looking at all in full.
    """
    n_references = references.constants.size
    n_shifts = shifts.nx * shifts.ny
    total_weight = (rings.weights * rings.lengths).sum()
    all_rows = rings.first_row[1:] - rings.first_row[:-1]
    n_lanes = min(LANES, slots.size * n_shifts - block * LANES)
    lanes = np.zeros((LANES, 3), np.int64)  # particle (-1: a shift beyond its range), ix, iy
    scale = np.zeros(LANES)
    for i in range(n_lanes):
        p, shift = slots[(block * LANES + i) // n_shifts], (block * LANES + i) % n_shifts
        ix, iy = part_x + shifts.parts * (shift % shifts.nx), part_y + shifts.parts * (shift // shifts.nx)
        lanes[i, 0] = p if ix < count[p, 0] and iy < count[p, 1] else -1
        lanes[i, 1], lanes[i, 2] = first[p, 0] + ix, first[p, 1] + iy
        mean = scratch.moments[0, i] / total_weight
        variance = scratch.moments[1, i] / total_weight - mean * mean
        scale[i] = 0.5 / (rings.lengths[0] * np.sqrt(variance)) if variance > 0.0 else 0.0
    if references.n_kept < references.kept.size:
        for k in range(n_references):
            _peaks(k, references, references.kept, references.n_kept, total_weight, rings, scratch)
            for i in range(n_lanes):
                peak = max(scratch.largest[i], scratch.largest[LANES + i])
                scratch.bounds[k, i] = scale[i] * peak + references.lost[k]
    else:
        scratch.bounds[:] = np.inf
    scratch.exact[:] = False
    while True:
        k = _most_promising(scratch.bounds, scratch.exact, lanes, n_lanes, found)
        if k < 0:
            return
        scratch.exact[k] = True
        z = _peaks(k, references, all_rows, all_rows.size, total_weight, rings, scratch)
        for i in range(n_lanes):
            if lanes[i, 0] >= 0:
                _keep_better(z, i, rings.lengths[0], scratch.largest, scale[i], lanes[i, 0], k, lanes[i, 1],
                             lanes[i, 2], found)


@njit(cache=True)
def _most_promising(bounds, exact, lanes, n_lanes, found):
    """The reference not yet looked at in full that may exceed a particle's best peak by most; -1 if none may."""
    best, margin = -1, 0.0
    for k in range(bounds.shape[0]):
        if not exact[k]:
            for i in range(n_lanes):
                p = lanes[i, 0]
                if p >= 0 and bounds[k, i] >= found.peak[p]:
                    excess = bounds[k, i] - max(found.peak[p], 0.0)
                    if best < 0 or excess > margin:
                        best, margin = k, excess
    return best


@njit(cache=True)
def _keep_better(z, lane, length, largest, scale, p, k, ix, iy, found):
    """Take this candidate if its peak is the higher; of equal ones the later in the order (iy, ix, reference)."""
    mirror = largest[LANES + lane] > largest[lane]
    column = LANES + lane if mirror else lane
    peak = scale * largest[column]
    later = (iy, ix, k) > (found.iy[p], found.ix[p], found.assign[p])
    if peak > found.peak[p] or (peak == found.peak[p] and later):
        found.peak[p] = peak
        found.assign[p] = k
        found.mirror[p] = mirror
        found.ix[p], found.iy[p] = ix, iy
        found.alpha[p] = 360.0 * refine_angle(z, column, length, largest[column]) / length % 360.0


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
    n_slots = particles_together(shifts.nx * shifts.ny)
    n_groups = -(-n_particles // n_slots)
    for chunk in prange(n_chunks):
        scratch = _new_scratch(images.shape[1], n_slots, references.constants.size, rings, shifts)
        slots = np.empty(n_slots, np.int64)
        for group in range(chunk * n_groups // n_chunks, (chunk + 1) * n_groups // n_chunks):
            for slot in range(n_slots):
                slots[slot] = min(group * n_slots + slot, n_particles - 1)
            _search_group(slots, images, centres, first, count, references, rings, shifts, scratch, found)


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
