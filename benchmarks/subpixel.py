"""What ``subpixel`` gives and costs: errors as multiples of the Cramer-Rao bound, and time in units, on one thread.

The references are the true views; a particle with another class or mirror than the true one, or more than 10 degrees
off, is a gross error, and told apart. The unit is that of ``search.py``.
"""

import time

import numba
import numpy as np
from measure import interleaved_seconds, matrix_product

from mrefali.average import normalize_particles, normalize_references
from mrefali.geometry import compose, disc, identity_poses, inverse_shift, invert, make_poses
from mrefali.search import Search, align, ring_spectra
from mrefali.sharpening import sharpen, splines
from mrefali.simulation import make_views, render, simulate_particles

#: (box, ou, SNR).
CASES = [(64, 27, 1.0), (64, 27, 0.3), (64, 27, 0.1), (64, 27, 0.05), (128, 55, 1.0), (128, 55, 0.3), (128, 55, 0.1)]
N_VIEWS, HALF_RANGE, SEED, REPEATS = 8, 3, 3, 9


def bounds(particles, snr, box, outer_radius):
    """Cramer-Rao bounds, (n, 3): shifts in px, angle in radians; J_ij = sum g_i g_j / s^2 over the disc."""
    views, steps, slopes = make_views(N_VIEWS, box, seed=SEED), (0.02, 0.02, 0.004), []
    for axis, step in enumerate(steps):
        way = [0.0, 0.0, 0.0]
        way[axis] = step
        way = make_poses(np.rad2deg(way[2]), way[0], way[1])
        ahead, behind = (render(views, particles.classes, compose(particles.poses, w)).astype(float)
                         for w in (way, invert(way)))
        slopes.append((ahead - behind) / (2 * step))
    y, x = np.indices((box, box)) - box // 2
    middle = inverse_shift(particles.poses)[:, :, None, None]
    inside = (x - middle[:, 0]) ** 2 + (y - middle[:, 1]) ** 2 <= outer_radius**2
    clean = render(views, particles.classes, particles.poses)
    variance = clean[:, disc(box, box // 2 - 2)].var(axis=1, dtype=float) / snr
    g = np.stack(slopes, axis=1) * inside[:, None]
    information = np.einsum("piyx,pjyx->pij", g, g, optimize=True) / variance[:, None, None]
    return np.sqrt(np.diagonal(np.linalg.inv(information), axis1=1, axis2=2))


def report(box, outer_radius, snr):
    """One line of the table."""
    n = 800 if box == 64 else 400
    search = Search(box, 1, outer_radius, 1, HALF_RANGE, HALF_RANGE, 1)
    particles = simulate_particles(n, N_VIEWS, box, snr=snr, seed=SEED)
    images, inside = particles.images.copy(), disc(box, outer_radius)
    normalize_particles(images, inside)
    views = normalize_references(particles.views, inside)
    coefficients = splines(views)
    found = align(images, identity_poses(n), ring_spectra(views, search), search)
    refined = sharpen(images, found, coefficients, search)
    seconds = interleaved_seconds(
        {"unit": matrix_product(), "sharpen": lambda: sharpen(images, found, coefficients, search)}, REPEATS)
    bound, columns = bounds(particles, snr, box, outer_radius), []
    for poses in (found.poses, refined.poses):
        error = compose(invert(particles.poses), poses)
        turn = np.deg2rad((error["alpha"] + 180) % 360 - 180)
        good = (found.assign == particles.classes) & (error["mirror"] == 0) & (np.abs(turn) < np.deg2rad(10))
        errors = np.stack([error["sx"], error["sy"], turn], axis=1)[good]
        multiples = np.sqrt(((errors / bound[good]) ** 2).mean(axis=0))
        columns.append(f"{np.sqrt((errors[:, :2] ** 2).mean()):9.3f} px {np.rad2deg(errors[:, 2].std()):6.3f} deg"
                       f"{np.sqrt((multiples[:2] ** 2).mean()):8.2f} {multiples[2]:5.2f}")
    print(f"{box:3d}  {snr:4g}  {100 * (1 - good.mean()):4.1f} %  {columns[0]}  {columns[1]}"
          f"  {1e3 * seconds['sharpen'] / n:8.3f} ms {seconds['sharpen'] / n / seconds['unit']:8.4f}", flush=True)


def main():
    numba.set_num_threads(1)
    began = time.perf_counter()
    print("box  SNR   gross   search: rms shift, angle, times the bound   subpixel: the same"
          "                    time a particle, units")
    for case in CASES:
        report(*case)
    print(f"{time.perf_counter() - began:.0f} s in all, one thread")


if __name__ == "__main__":
    main()
