"""The reference method once more, slow and plain, in float64 numpy from the formulas of the SPEC alone.

Every fast kernel of ``mrefali`` is held against these functions. They share nothing with the package but the
POSE arrays that stand for (alpha, sx, sy, mirror).
"""

import itertools
import random

import numpy as np
from scipy.optimize import minimize

POSE = np.dtype([("alpha", "f8"), ("sx", "f8"), ("sy", "f8"), ("mirror", "i4")])


# --- section 2: geometry


def pose_matrix(pose):
    a = np.deg2rad(pose["alpha"])
    flip = np.diag([-1.0 if pose["mirror"] else 1.0, 1.0, 1.0])
    return flip @ np.array([[np.cos(a), np.sin(a), pose["sx"]], [-np.sin(a), np.cos(a), pose["sy"]], [0, 0, 1]])


def matrix_pose(matrix):
    mirror = int(np.linalg.det(matrix[:2, :2]) < 0)
    m = np.diag([-1.0 if mirror else 1.0, 1.0, 1.0]) @ matrix
    pose = np.zeros((), POSE)
    pose["alpha"], pose["sx"], pose["sy"] = np.rad2deg(np.arctan2(m[0, 1], m[0, 0])) % 360, m[0, 2], m[1, 2]
    pose["mirror"] = mirror
    return pose


def compose(*poses):
    matrix = np.eye(3)
    for p in poses:
        matrix = pose_matrix(p) @ matrix
    return matrix_pose(matrix)


def pose(alpha=0.0, sx=0.0, sy=0.0, mirror=0):
    p = np.zeros((), POSE)
    p["alpha"], p["sx"], p["sy"], p["mirror"] = alpha, sx, sy, mirror
    return p


def transform(image, p):
    """``image`` moved by pose ``p``, with the six-point quadratic formula."""
    n = image.shape[0]
    c = n // 2
    a = np.deg2rad(p["alpha"])
    qy, qx = np.meshgrid(np.arange(n) - c - p["sy"], np.arange(n) - c - p["sx"], indexing="ij")
    x = np.cos(a) * qx - np.sin(a) * qy + c
    y = np.sin(a) * qx + np.cos(a) * qy + c
    inside = (x >= 0) & (x < n) & (y >= 0) & (y < n)
    i, j = np.floor(x).astype(int), np.floor(y).astype(int)
    u, v = x - i, y - j

    def f(di, dj):
        return image[(j + dj) % n, (i + di) % n]

    f0 = f(0, 0)
    a1 = f(1, 0) - f0
    a2 = (a1 - f0 + f(-1, 0)) / 2
    b1 = f(0, 1) - f0
    b2 = (b1 - f0 + f(0, -1)) / 2
    m = f(1, 1) - f0 - a1 - b1
    out = np.where(inside, f0 + u * (a1 + (u - 1) * a2 + v * m) + v * (b1 + (v - 1) * b2), image)
    if p["mirror"]:
        flipped = out.copy()
        columns = np.arange(n)
        source = 2 * c - columns
        kept = (source >= 0) & (source < n)
        flipped[:, columns[kept]] = out[:, source[kept]]
        out = flipped
    return out


# --- sections 3 and 4: rings and the search


def rings(ir, ou, rs):
    radii = list(range(ir, ou + 1, rs))
    lengths = [2 ** (int(np.log2(int(2 * np.pi * r + 0.5))) + 1) for r in radii]
    return radii, lengths


def polar(image, x0, y0, radii, lengths):
    """Bilinear samples of ``image`` on each ring about (x0, y0); of several images about (n_images,) x0 and y0."""
    n = image.shape[-1]
    each = () if image.ndim == 2 else (np.arange(len(image))[:, None],)
    samples = []
    for r, length in zip(radii, lengths, strict=True):
        t = 2 * np.pi * np.arange(length) / length
        x, y = np.asarray(x0)[..., None] + r * np.sin(t), np.asarray(y0)[..., None] + r * np.cos(t)
        i, j = np.floor(x).astype(int), np.floor(y).astype(int)
        u, v = x - i, y - j
        i1, j1 = np.minimum(i + 1, n - 1), np.minimum(j + 1, n - 1)  # only ever met with weight 0
        samples.append((1 - v) * ((1 - u) * image[(*each, j, i)] + u * image[(*each, j, i1)])
                       + v * ((1 - u) * image[(*each, j1, i)] + u * image[(*each, j1, i1)]))
    return samples


def reference_spectra(reference, ir, ou, rs):
    radii, lengths = rings(ir, ou, rs)
    c = reference.shape[0] // 2
    spectra = []
    for r, length, ring in zip(radii, lengths, polar(reference, c, c, radii, lengths), strict=True):
        spectrum = np.fft.rfft(ring) * (2 * np.pi * r / length) * (lengths[-1] / length)
        if length < lengths[-1]:
            spectrum[-1] /= 2
        spectra.append(spectrum)
    return spectra


def particle_spectra(image, x0, y0, ir, ou, rs):
    """Ring spectra of a normalised particle about (x0, y0), or of several about (n_particles,) x0 and y0."""
    radii, lengths = rings(ir, ou, rs)
    samples = polar(image, x0, y0, radii, lengths)
    weights = [2 * np.pi * r / length for r, length in zip(radii, lengths, strict=True)]
    total = sum(w * length for w, length in zip(weights, lengths, strict=True))
    mean = sum(w * ring.sum(axis=-1, keepdims=True) for w, ring in zip(weights, samples, strict=True)) / total
    var = sum(w * ((ring - mean) ** 2).sum(axis=-1, keepdims=True)
              for w, ring in zip(weights, samples, strict=True)) / total
    return [np.fft.rfft((ring - mean) / np.sqrt(var)) for ring in samples]


def correlations(reference, particle):
    """Straight and mirrored correlation at Lmax angles of the ring spectra of a reference and of particles."""
    n_freq = len(reference[-1])
    straight, mirrored = np.zeros((2, *particle[-1].shape[:-1], n_freq), complex)
    for c, d in zip(reference, particle, strict=True):
        straight[..., : len(c)] += c * np.conj(d)
        mirrored[..., : len(c)] += np.conj(c) * np.conj(d)
    length = 2 * (n_freq - 1)
    return np.fft.irfft(straight, length), np.fft.irfft(mirrored, length)


def best_angle(ccf):
    """Largest value (a later equal one wins) and its angle in degrees, refined by a parabola over 7 samples."""
    length = len(ccf)
    index = length - 1 - int(np.argmax(ccf[::-1]))
    x = np.arange(-3, 4)
    a, b, _ = np.polyfit(x, ccf[(index + x) % length], 2)
    offset = -b / (2 * a) if a != 0 else 0.0
    return ccf[index], 360.0 * (index + offset) / length % 360.0


def shift_grid(half_range, h, n, ou, step):
    cn = n // 2 + 1
    right = min(half_range, max(0.0, n - cn - h - ou))
    left = min(half_range, max(0.0, cn + h - ou - 2))
    steps = [int(distance / step + 1e-6) for distance in (left, right)]  # 0.3 holds three steps of 0.1
    return [i * step for i in range(-steps[0], steps[1] + 1)]


def start_centre(start, n, ou):
    """Where the rings are centred at shift 0, about the centre pixel; (0, 0) where that lies too far out."""
    a = np.deg2rad(start["alpha"])
    hx = -(np.cos(a) * start["sx"] - np.sin(a) * start["sy"])
    hy = -(np.sin(a) * start["sx"] + np.cos(a) * start["sy"])
    return (0.0, 0.0) if max(abs(hx), abs(hy)) > n // 2 + 1 - ou - 2 else (hx, hy)


def search(image, spectra, start, ir, ou, rs, xr, yr, ts):
    """Best (peak, assign, pose) of one normalised particle over all references, shifts and angles."""
    n = image.shape[0]
    c = n // 2
    hx, hy = start_centre(start, n, ou)
    best = (-np.inf,)
    for iy in shift_grid(yr, hy, n, ou, ts):
        for ix in shift_grid(xr, hx, n, ou, ts):
            particle = particle_spectra(image, c + hx + ix, c + hy + iy, ir, ou, rs)
            for k, reference in enumerate(spectra):
                straight, mirrored = correlations(reference, particle)
                q, t = best_angle(straight), best_angle(mirrored)
                mirror = int(t[0] > q[0])
                peak, angle = t if mirror else q
                if peak >= best[0]:
                    best = (peak, k, angle, mirror, ix, iy)
    peak, assign, angle, mirror, ix, iy = best
    a = np.deg2rad(angle)
    found = compose(pose(0, -hx, -hy),
                    pose(angle, -np.cos(a) * ix - np.sin(a) * iy, np.sin(a) * ix - np.cos(a) * iy),
                    pose(mirror=mirror))
    return peak, assign, found


def peaks(images, spectra, starts, ir, ou, rs, xr, yr, ts):
    """The largest value over all angles of every correlation that ``search`` compares, of many particles at once.

    Returns
    -------
    (n_particles, n_y, n_x, n_references, 2) float64
        [particle, y shift, x shift, reference, mirror]; shift 0 in the middle, -inf beyond a particle's range.
    """
    n = images.shape[1]
    h = np.array([start_centre(start, n, ou) for start in starts])
    grids = [[shift_grid(half, centre[axis], n, ou, ts) for centre in h] for axis, half in enumerate((xr, yr))]
    x_shifts, y_shifts = ([i * ts for i in range(-int(half / ts + 1e-6), int(half / ts + 1e-6) + 1)]
                          for half in (xr, yr))
    found = np.full((len(images), len(y_shifts), len(x_shifts), len(spectra), 2), -np.inf)
    for j, iy in enumerate(y_shifts):
        for i, ix in enumerate(x_shifts):
            mine = np.array([ix in x_grid and iy in y_grid for x_grid, y_grid in zip(*grids, strict=True)])
            particles = particle_spectra(images[mine], n // 2 + h[mine, 0] + ix, n // 2 + h[mine, 1] + iy, ir, ou, rs)
            for k, reference in enumerate(spectra):
                for mirror, ccf in enumerate(correlations(reference, particles)):
                    found[mine, j, i, k, mirror] = ccf.max(axis=-1)
    return found


# --- section 5: averages, FRC, filter, centre


def frc(f, g):
    """FRC of two images: frequency, value, and twice the number of coefficients of each ring."""
    n = f.shape[0]
    half = n // 2
    ky = np.fft.fftfreq(n, 1 / n)[:, None]
    kx = np.arange(half + 1)[None, :]
    ring = np.floor(np.sqrt(kx**2 + ky**2) + 0.5).astype(int)
    ring[(kx == 0) & (ky < 0) & (ky != -n / 2)] = n  # the conjugate half of the kx = 0 column
    a, b = np.fft.rfft2(f), np.fft.rfft2(g)
    table = []
    for i in range(half + 1):
        r = ring == i
        product = np.real(a[r] * np.conj(b[r])).sum()
        power = np.sqrt((np.abs(a[r]) ** 2).sum() * (np.abs(b[r]) ** 2).sum())
        table.append((i / (2 * half), product / power, 2 * r.sum()))
    return np.array(table)


def tanh_filter(f, fl, aa):
    return 0.5 * (np.tanh(np.pi * (f + fl) / (2 * aa * fl)) - np.tanh(np.pi * (f - fl) / (2 * aa * fl)))


def fit_filter(table):
    """Cut-off and fall-off of the tanh low-pass that ``ref_ali2d`` fits to a FRC table."""
    f = table[:, 0]
    value = table[:, 1].copy()
    value[0] = abs(value[0])
    value = 2 * value / (1 + value)
    low = np.nonzero(value[1:] < 0.1)[0]
    if len(low):
        value[low[0] + 1 :] = 0.0
    below = np.nonzero(value[1:] < 0.5)[0]
    if not len(below):
        return 0.4, 0.2
    start = np.array([f[below[0]], 0.1])
    simplex = np.array([start, start + [0.05, 0], start + [0, 0.05]])

    def misfit(p):
        return ((value - tanh_filter(f, *p)) ** 2).sum()

    fl, aa = minimize(misfit, start, method="Nelder-Mead",
                      options={"initial_simplex": simplex, "xatol": 1e-6, "fatol": 1e-12, "maxiter": 2000}).x
    return min(max(fl, 0.12), 0.4), min(aa, 0.2)


def frequencies(n):
    return np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None, :])


def low_pass(image, fl, aa):
    n = image.shape[0]
    return np.fft.irfft2(np.fft.rfft2(image) * tanh_filter(frequencies(n), fl, aa), s=(n, n))


def phase_center(image):
    """Phase centre of gravity (x, y) relative to the centre pixel."""
    n = image.shape[0]
    out = []
    for axis in (0, 1):
        phase = np.angle((image.sum(axis=axis) * np.exp(2j * np.pi * np.arange(n) / n)).sum())
        position = phase * n / (2 * np.pi) - n // 2
        out.append((position + n / 2) % n - n / 2)
    return np.array(out)


def fourier_shift(image, dx, dy):
    n = image.shape[0]
    phase = np.exp(-2j * np.pi * (np.fft.fftfreq(n)[:, None] * dy + np.fft.rfftfreq(n)[None, :] * dx))
    return np.fft.irfft2(np.fft.rfft2(image) * phase, s=(n, n))


def fourier_transform(image, pose):
    """The trigonometric polynomial through the pixels, summed up at the place that each pixel of the result shows."""
    n = image.shape[0]
    c = n // 2
    k = np.fft.fftfreq(n, 1 / n)
    coefficients = np.fft.fft2(image) / n**2
    a = np.deg2rad(pose["alpha"])
    moved = np.empty((n, n))
    for row in range(n):
        for column in range(n):
            qx = (-1 if pose["mirror"] else 1) * (column - c) - pose["sx"]
            if column == 0 and n % 2 == 0:
                qx = -c - pose["sx"]  # the flip leaves this column where it is
            qy = row - c - pose["sy"]
            x, y = np.cos(a) * qx - np.sin(a) * qy + c, np.sin(a) * qx + np.cos(a) * qy + c
            wave_x, wave_y = np.exp(2j * np.pi * k * x / n), np.exp(2j * np.pi * k * y / n)
            if n % 2 == 0:  # the last frequency, half at n / 2 and half at -n / 2
                wave_x[c], wave_y[c] = np.cos(np.pi * x), np.cos(np.pi * y)
            moved[row, column] = (wave_y @ coefficients @ wave_x).real
    return moved


# --- the whole run


def run(images, references, poses, mask, ir, ou, rs, xr, yr, ts, center, iterations, seed=1000):
    """All iterations; a list of one dict an iteration."""
    n_particles, n = images.shape[:2]
    rng = random.Random(seed)
    inside = mask != 0
    core = mask > 0.5
    images = np.array([(im - im[inside].mean()) / im[inside].std() for im in images.astype(float)])
    references = [ref.astype(float) for ref in references]
    poses = poses.copy()
    history = []
    for _ in range(iterations):
        spectra = [reference_spectra(ref - ref[inside].mean(), ir, ou, rs) for ref in references]
        found = [search(image, spectra, p, ir, ou, rs, xr, yr, ts)
                 for image, p in zip(images, poses, strict=True)]
        assign = np.array([result[1] for result in found])
        poses = np.array([result[2] for result in found], POSE)
        history.append(update(images, references, poses, assign, mask, core, center, rng))
        history[-1].update(peak=np.array([result[0] for result in found]))
    return history


def update(images, references, poses, assign, mask, core, center, rng):
    """New references in place; centring shifts are composed into ``poses`` in place."""
    n = images.shape[1]
    tables, filters, centers, members = {}, {}, {}, []
    for k in range(len(references)):
        mine = np.nonzero(assign == k)[0]
        members.append(mine)
        if len(mine) < 4:
            drawn = rng.randint(0, len(images) - 1)
            references[k] = images[drawn]
            members[k] = np.array([drawn])
            continue
        halves = np.zeros((2, n, n))
        for i in mine:
            halves[i % 2] += transform(images[i], poses[i])
        tables[k] = frc(halves[0], halves[1])
        filters[k] = fit_filter(tables[k])
        average = halves.sum(axis=0) / len(mine)
        average = low_pass((average - average[core].mean()) * mask, *filters[k])
        c = np.zeros(2)
        if center == 1:
            c = phase_center(average)
        elif center == -1:
            sign = np.where(poses["mirror"][mine] == 1, -1, 1)
            c = np.array([(sign * poses["sx"][mine]).mean(), poses["sy"][mine].mean()])
        centers[k] = c
        if center:
            average = fourier_shift(average, -c[0], -c[1])
            for i in mine:
                poses[i] = compose(poses[i], pose(0, -c[0], -c[1]))
        references[k] = average
    criterion = sum((ref[core] ** 2).mean() for ref in references)
    return dict(assign=assign, poses=poses.copy(), averages=np.array(references), frc=tables, filters=filters,
                centers=centers, members=members, criterion=criterion)


# --- classes of limited size


def best_worth(scores, fewest, most):
    """Largest sum of the scores of any assignment with ``fewest`` to ``most`` particles in each class: try them all."""
    n_particles, n_classes = scores.shape
    worths = [sum(float(scores[i, k]) for i, k in enumerate(assign))
              for assign in itertools.product(range(n_classes), repeat=n_particles)
              if all(fewest <= assign.count(k) <= most for k in range(n_classes))]
    return max(worths)
