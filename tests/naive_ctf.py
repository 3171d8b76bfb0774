"""The CTF of the reference method (SPEC section 7), slow and plain, in float64 numpy on top of ``naive``.

Shares nothing with the package; CTF parameters are eight numbers in the order of an EMAN2 string, and a
phase plate's shift in degrees.
"""

import random

import naive
import numpy as np


def ctf(k2, azimuth, defocus, dfdiff, dfang, bfactor, ampcont, voltage, cs, phase_shift):
    """CTF at squared spatial frequency ``k2`` in 1/A^2 and ``azimuth`` in radians."""
    wavelength = 12.398 / np.sqrt(voltage * (1022 + voltage))
    w = ampcont / 100
    dz = defocus - dfdiff / 2 * np.sin(2 * (azimuth + np.deg2rad(dfang)))
    phase = np.pi * (dz * 1e4 * wavelength * k2 - cs * 1e7 * wavelength**3 * k2**2 / 2)
    phase += np.arctan(w / np.sqrt(1 - w**2)) + np.deg2rad(phase_shift)
    return np.sin(phase) * np.exp(-bfactor * k2 / 4)


def grid(n):
    """Frequencies in Fourier pixels of an n-pixel rfft2, (ky, kx); n/2 counts positive."""
    ky = np.fft.fftfreq(n, 1 / n)
    ky[ky == -n / 2] = n / 2
    return np.meshgrid(ky, np.arange(n // 2 + 1), indexing="ij")


def ctf_grid(n, *parameters):
    ky, kx = grid(n)
    *parameters, pixel_size, phase_shift = parameters
    return ctf((kx**2 + ky**2) / (n * pixel_size) ** 2, np.arctan2(ky, kx), *parameters, phase_shift)


def ctf_sq(n, defocus, dfdiff, dfang, *parameters):
    """CTF^2 at the mean defocus at Fourier pixels 0, 1, ... n - 1, beyond the corner of the grid."""
    *parameters, pixel_size, phase_shift = parameters
    return ctf((np.arange(n) / (n * pixel_size)) ** 2, 0.0, defocus, 0.0, 0.0, *parameters,
               phase_shift) ** 2


def premultiply(image, outside, parameters):
    """``image`` times its CTF: in a box of twice the size, padded with the mean of its outermost pixels."""
    n = image.shape[0]
    image = image - image[outside].mean()
    frame = np.ones((n, n), bool)
    frame[1:-1, 1:-1] = False
    padded = np.full((2 * n, 2 * n), image[frame].mean())
    at = slice(n // 2 + n % 2, n // 2 + n % 2 + n)
    padded[at, at] = image
    return np.fft.irfft2(np.fft.rfft2(padded) * ctf_grid(2 * n, *parameters), s=(2 * n, 2 * n))[at, at]


def wiener_divide(image, ctf_sq_sum, snr):
    """``image`` times 1 / (sum of CTF^2 + 1/snr), a table that is linear between whole Fourier pixels."""
    n = image.shape[0]
    gain = np.interp(np.hypot(*grid(n)), np.arange(n), 1 / (ctf_sq_sum + 1 / snr))
    return np.fft.irfft2(np.fft.rfft2(image) * gain, s=(n, n))


def run(images, parameters, applied, snr, references, poses, mask, ir, ou, rs, xr, yr, ts, center, iterations,
        seed=1000):
    """``naive.run`` with the CTF: ``parameters`` and ``applied`` hold one entry a particle."""
    rng = random.Random(seed)
    inside, core = mask != 0, mask > 0.5
    images = np.array([im if done else premultiply(im, mask < 0.5, p)
                       for im, done, p in zip(images.astype(float), applied, parameters, strict=True)])
    images = np.array([(im - im[inside].mean()) / im[inside].std() for im in images])
    weights = np.array([ctf_sq(images.shape[1], *p) for p in parameters])
    references = [ref.astype(float) for ref in references]
    poses = poses.copy()
    history = []
    for _ in range(iterations):
        spectra = [naive.reference_spectra(ref - ref[inside].mean(), ir, ou, rs) for ref in references]
        found = [naive.search(image, spectra, p, ir, ou, rs, xr, yr, ts)
                 for image, p in zip(images, poses, strict=True)]
        assign = np.array([result[1] for result in found])
        poses = np.array([result[2] for result in found], naive.POSE)
        history.append(update(images, weights, snr, references, poses, assign, mask, core, center, rng))
        history[-1].update(peak=np.array([result[0] for result in found]))
    return history


def update(images, weights, snr, references, poses, assign, mask, core, center, rng):
    """``naive.update`` with Wiener division in place of the division by the count."""
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
        halves, sums = np.zeros((2, n, n)), np.zeros((2, n))
        for i in mine:
            halves[i % 2] += naive.transform(images[i], poses[i])
            sums[i % 2] += weights[i]
        tables[k] = naive.frc(*(wiener_divide(half, s, snr) for half, s in zip(halves, sums, strict=True)))
        filters[k] = naive.fit_filter(tables[k])
        average = wiener_divide(halves.sum(axis=0), sums.sum(axis=0), snr)
        average = naive.low_pass((average - average[core].mean()) * mask, *filters[k])
        c = np.zeros(2)
        if center == 1:
            c = naive.phase_center(average)
        elif center == -1:
            sign = np.where(poses["mirror"][mine] == 1, -1, 1)
            c = np.array([(sign * poses["sx"][mine]).mean(), poses["sy"][mine].mean()])
        centers[k] = c
        if center:
            average = naive.fourier_shift(average, -c[0], -c[1])
            for i in mine:
                poses[i] = naive.compose(poses[i], naive.pose(0, -c[0], -c[1]))
        references[k] = average
    criterion = sum((ref[core] ** 2).mean() for ref in references)
    return dict(assign=assign, poses=poses.copy(), averages=np.array(references), frc=tables, filters=filters,
                centers=centers, members=members, criterion=criterion)
