"""Classes of real particles beside published averages of the same: two rows of pictures, and how alike they are.

``python benchmarks/real.py PARTICLES AVERAGES FOLDER`` has ``classify`` sort a copy of the particles in FOLDER, which
must not exist. FOLDER/beside.png has its averages in the upper row, the largest class first, turned like the published
one that each is most like, which stands below it. Box and pixel size must be the same.
"""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import fire
import numpy as np

import mrefali
from mrefali import average, geometry, plots
from mrefali.io import open_stack
from mrefali.search import Search, align, ring_spectra

HALF_RANGE = 3


def most_like(averages, published):
    """Of each average the number of the published one that is most like it, and the average moved onto that."""
    box = averages.shape[1]
    radius = geometry.largest_outer_radius(box) - HALF_RANGE
    inside, search = geometry.disc(box, radius), Search(box, 1, radius, 1, HALF_RANGE, HALF_RANGE, 0.5, True)
    for images in (averages, published):
        average.normalize_particles(images, inside)
    found = align(averages, geometry.identity_poses(len(averages)), ring_spectra(published, search), search)
    moved = average.transform(averages, found.poses)
    alike = [np.corrcoef(image[inside], published[k][inside])[0, 1]
             for image, k in zip(moved, found.assign, strict=True)]
    return found.assign, moved, np.array(alike)


def main(particles, averages, folder, K=20):
    """Classify and compare.

    Parameters
    ----------
    particles, averages, folder : str
    K : int
    """
    folder = Path(folder)
    folder.mkdir()
    stack = folder / f"particles{Path(particles).suffix}"
    shutil.copyfile(particles, stack)
    subprocess.run([Path(sys.executable).parent / "mrefali", "classify", stack, folder / "classes", f"--K={K}",
                    "--quiet"], check=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = usage.ru_utime + usage.ru_stime
    run = mrefali.open_run(folder / "classes")
    order = np.argsort(-run.counts[-1], kind="stable")
    published = open_stack(averages)
    others = published.read(0, published.n_images)
    numbers, moved, alike = most_like(run.averages[order], others)
    counts = run.counts[-1, order]
    print(f"{len(order)} classes of {'/'.join(map(str, counts))} particles in {seconds:.0f} s of a core\n"
          f"resolution at FRC 0.5: {'/'.join(run.in_words(r) for r in run.resolution_05_px[-1, order])}\n"
          f"correlation with the published one that is most like: {'/'.join(f'{r:.2f}' for r in alike)}")
    captions = [f"{k}: {count}" for k, count in zip(order, counts, strict=True)] + [f"published {k}" for k in numbers]
    plots.montage([*moved, *others[numbers]], captions, len(order)).savefig(folder / "beside.png", dpi=144)


if __name__ == "__main__":
    fire.Fire(main)
