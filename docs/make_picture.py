"""Makes ``docs/images/demo.png``, the README's picture, from a run of the demo."""

import tempfile
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mrefali import demo, open_stack
from mrefali.average import transform
from mrefali.geometry import invert
from mrefali.simulation import read_truth

PICTURE = Path(__file__).parent / "images" / "demo.png"
SHOWN = slice(10, 54)  # of 64 px: the particle, without most of the empty rim


def rows_of(outdir, found):
    """The rows, ``{title: (n_views, n, n) images}``, and the particles found of each, in order of the true views."""
    particles, references, averages, views = (open_stack(outdir / name) for name in (
        "particles.hdf", "references.hdf", "run/multi_ref.hdf", "particles_views.hdf"))
    classes, _ = read_truth(outdir / "particles_truth.csv")
    shown = [np.flatnonzero(classes == view)[0] for view in range(views.n_images)]
    class_of_view = np.argsort(found.view_of_class)
    # an average may stand turned against its view; here both are to be seen alike
    upright = transform(averages.read(0, averages.n_images), invert(found.common))
    counts = np.array(averages.column("ave_n"))[class_of_view]
    rows = {
        "one of the\nparticles": particles.read_at(shown),
        "initial\nreferences": references.read(0, references.n_images)[class_of_view],
        "class averages\nafter 5 iterations": upright[class_of_view],
        "the truth,\nfree of noise": views.read(0, views.n_images),
    }
    return rows, counts


def draw(rows, counts, path):
    """One row of grey images under another, each with its title on the left, and the counts above."""
    n_columns = len(next(iter(rows.values())))
    figure, axes = plt.subplots(len(rows), n_columns, figsize=(8.4, 4.96), dpi=100)
    figure.subplots_adjust(left=0.172, right=0.995, top=0.947, bottom=0.008, wspace=0.04, hspace=0.04)
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            low, high = np.percentile(image[SHOWN, SHOWN], [0.5, 99.7])
            axis.imshow(image[SHOWN, SHOWN], cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="bicubic")
            axis.set_axis_off()
        box = row[0].get_position()
        figure.text(0.16, (box.y0 + box.y1) / 2, title, ha="right", va="center", fontsize=10, linespacing=1.35)
    for axis, count in zip(axes[0], counts, strict=True):
        axis.set_title(f"{count} particles", fontsize=9, color="0.35", pad=4)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Software": None}, pil_kwargs={"optimize": True})
    plt.close(figure)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        outdir = Path(folder, "demo")
        draw(*rows_of(outdir, demo(outdir)), PICTURE)
