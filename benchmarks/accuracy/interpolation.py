"""What interpolation costs the averages: FRC with the true view near Nyquist, of particles in their true poses."""

import time

import numba
import numpy as np

from mrefali import average
from mrefali.fourier import INTERPOLATIONS
from mrefali.simulation import simulate_particles

PARTICLES, VIEWS, BOX, SEEDS, RINGS = 1000, 2, 64, 3, (20, 23, 26, 29, 32)


def main():
    numba.set_num_threads(1)  # what a thread waits for another would count too
    print("SNR, interpolation: FRC at", ", ".join(f"{ring / BOX:.2f}" for ring in RINGS), "1/px; ms, one core")
    for snr in (1.0, 0.1):
        for name, move in INTERPOLATIONS.items():
            move(np.zeros((1, BOX, BOX), np.float32), np.zeros(1, simulate_particles(1, 1).poses.dtype))  # compiles
            curves, seconds = [], 0.0
            for seed in range(SEEDS):
                particles = simulate_particles(PARTICLES, VIEWS, BOX, snr, seed=seed)
                began = time.process_time()
                moved = move(particles.images, particles.poses)
                seconds += time.process_time() - began
                curves += [average.frc(moved[particles.classes == k].sum(axis=0, dtype=np.float64),
                                       particles.views[k].astype(np.float64))[:, 1] for k in range(VIEWS)]
            values = ", ".join(f"{value:.3f}" for value in np.mean(curves, axis=0)[list(RINGS)])
            print(f"{snr:g}, {name}: {values}; {1000 * seconds / (SEEDS * PARTICLES):.2f}", flush=True)


if __name__ == "__main__":
    main()
