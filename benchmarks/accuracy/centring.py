"""How far class averages are moved in each iteration by the original's centring and by the one that settles."""

import numpy as np

import mrefali
from mrefali.reference import fourier_shift
from mrefali.simulation import simulate_particles

PARTICLES, VIEWS, BOX, SEED, ITERATIONS, SNRS = 200, 2, 64, 5, 6, (0.3, 0.1)
#: Where the references stand at first, x and y in px.
OFF_CENTRE = (2.5, -1.5)


def centres(snr, center):
    """x, y in px of the centre that was found of each average, (ITERATIONS, VIEWS, 2)."""
    made = simulate_particles(PARTICLES, VIEWS, BOX, snr=snr, seed=SEED)
    references = np.stack([fourier_shift(view.astype(float), OFF_CENTRE) for view in made.views])
    found = mrefali.align(made.images, references, ou=25, xr=3, yr=3, center=center, maxit=ITERATIONS, quiet=True)
    return np.array([[-update.shift for update in iteration.classes] for iteration in found.iterations])


def main():
    print("| SNR | `--center` | class " + "".join(f"| {i} " for i in range(ITERATIONS)) + "|\n"
          + "|---" * (3 + ITERATIONS) + "|")
    for snr in SNRS:
        for center in (1, 4):
            for k, moves in enumerate(centres(snr, center).swapaxes(0, 1)):
                cells = " | ".join(f"{x:.1f}, {y:.1f}" if x or y else "0" for x, y in moves)
                print(f"| {snr:g} | {center} | {k} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
