"""Figures of a run and of images, for Jupyter and for files. Imports findings and pictures of ours; a run is what
:func:`mrefali.results.open_run` gives.

Figures are made without pyplot: nothing of the caller's backend or open figures changes.
"""

import base64
import html
import io
import math

import numpy as np
from matplotlib.figure import Figure

from mrefali import pictures
from mrefali.errors import InputError
from mrefali.findings import borders, started_centered

ORDERS = ("size", "number")

#: Colours of what matters, of a second thing beside it, and of many lines behind them.
INK, SECOND, MANY = "#0a6c74", "#b4520a", "#9aa4ad"

#: Inches of a tile of a montage, without and with a line of text below it, and of a line.
TILE, LINE = 1.1, 0.15

#: Largest side of a tile in px, and classes that a montage in Jupyter shows.
TILE_SIDE, SHOWN_CLASSES = 128, 24


class Picture(Figure):
    """A figure that Jupyter shows, whether or not pyplot was imported."""

    def _repr_png_(self):
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=96)
        return file.getvalue()


def montage(images, captions, columns=None):
    """Images beside one another, each with its own scale of greys and its caption below.

    Parameters
    ----------
    images : sequence of (n, n) array or None
        None where there is no image to show.
    captions : sequence of str
        Of one number of lines.
    columns : int, optional

    Returns
    -------
    Picture
    """
    if not len(images):
        raise InputError("there is no image to show: give at least one")
    columns = columns or min(len(images), max(4, math.ceil(math.sqrt(1.5 * len(images)))))
    rows, n_lines = math.ceil(len(images) / columns), captions[0].count("\n") + 1
    width, height = TILE * 1.04, TILE + LINE * (n_lines + 0.4)
    figure = Picture(figsize=(columns * width, rows * height))
    axes = figure.add_axes((0, 0, 1, 1))  # one for all, in inches from the upper left: hundreds would take a minute
    axes.set_axis_off()
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = (i % columns + 0.02) * width, i // columns * height
        middle = left + TILE / 2
        if image is None:
            axes.text(middle, top + TILE / 2, "vanished", ha="center", va="center", fontsize=7, color=MANY)
        else:
            axes.imshow(pictures.fit(pictures.grey(image), TILE_SIDE), cmap="gray", vmin=0, vmax=255,
                        extent=(left, left + TILE, top + TILE, top))
        axes.text(middle, top + TILE + 0.03, caption, ha="center", va="top", fontsize=7, linespacing=1.25,
                  parse_math=False)
    axes.set(xlim=(0, columns * width), ylim=(rows * height, 0))
    return figure


def run_montage(run, order="size", columns=None, most=None):
    """See :meth:`mrefali.results.Run.montage`; ``most`` classes are shown, or all of them."""
    return montage(*_tiles(run, _in_order(run, order)[:most]), columns)


def _in_order(run, order):
    if order not in ORDERS:
        raise InputError(f"order={order} is not known: give {' or '.join(ORDERS)}")
    return run.by_size if order == "size" else np.arange(run.n_references)


def _tiles(run, classes):
    images = [None if run.vanished[k] else run.averages[k] for k in classes]
    return images, [_caption(run, k) for k in classes]


def _caption(run, k):
    count, *resolutions = run.counts[-1, k], run.resolution_05_px[-1, k], run.resolution_0143_px[-1, k]
    return f"{k}: {count} ({count / run.n_particles:.1%})\n{' / '.join(map(run.in_words, resolutions))}"


def frc(run, classes=None):
    """See :meth:`mrefali.results.Run.plot_frc`."""
    classes = run.by_size[:12] if classes is None else np.atleast_1d(classes)
    wrong = [k for k in classes if not 0 <= k < run.n_references]
    if wrong:
        raise InputError(f"class {wrong[0]} is not there: give 0 to {run.n_references - 1}")
    figure, (axes,) = _figure(1, 5.4, 3.4)
    for k in classes:
        if not run.vanished[k]:
            axes.plot(run.frc[k, :, 0], run.frc[k, :, 1], lw=1.2, label=f"{k}: {run.counts[-1, k]}")
    for level in (0.5, 0.143):
        axes.axhline(level, color=MANY, lw=0.8, ls=":")
    axes.set(title="FRC of the two halves of a class", xlim=(0, 0.5), xlabel="frequency, 1/px")
    if run.pixel_size_A is not None:
        period = axes.secondary_xaxis(-0.22)
        period.set_xticks([0.1, 0.2, 0.3, 0.4, 0.5], [f"{run.pixel_size_A / f:.1f}" for f in (0.1, 0.2, 0.3, 0.4, 0.5)])
        period.set_xlabel("period, Å")
    if not run.vanished[classes].all():
        axes.legend(title="class: particles", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def convergence(run):
    """See :meth:`mrefali.results.Run.plot_convergence`."""
    run.require_iteration()
    figure, axes = _figure(4, 3.0, 2.6)
    iterations, unit = np.arange(run.n_iterations), run.pixel_size_A or 1.0
    axes[0].plot(iterations, run.criterion, "o-", color=INK, ms=3)
    axes[0].set_title("criterion")
    axes[1].plot(iterations[1:], 100 * run.changed[1:].sum(axis=1) / run.n_particles, "o-", color=INK, ms=3)
    axes[1].set_title("changed class, %")
    axes[2].plot(iterations, run.counts, color=MANY, lw=0.8)
    axes[2].plot(iterations, np.median(run.counts, axis=1), color=INK)
    axes[2].set_title("particles of each class, and their median", fontsize=8)
    axes[3].plot(iterations, unit * run.resolution_05_px, color=MANY, lw=0.8)
    axes[3].set_title(f"resolution at FRC 0.5, {'px' if run.pixel_size_A is None else 'Å'}")
    for one in axes:
        one.set(xlabel="iteration", xlim=(-0.3, max(run.n_iterations - 0.7, 1)))
        one.xaxis.get_major_locator().set_params(integer=True)
    for one in axes[1:3]:
        one.set_ylim(bottom=0)
    return figure


def shifts(run):
    """See :meth:`mrefali.results.Run.plot_shifts`."""
    figure, axes = _figure(3, 3.4, 2.6)
    for axis in (0, 1):
        place, b = run.centers[1][:, axis], borders(run, axis)
        n = max(1, math.ceil(np.abs(place).max() / b.step - 0.5))
        axes[axis].hist(place, (np.arange(-n, n + 2) - 0.5) * b.step, color="#69a9ae")
        for edge in b.reach if started_centered(run) and b.reach[1] > b.reach[0] else []:
            axes[axis].axvline(edge, color=SECOND, ls="--", lw=1.2)
        for edge in b.limit[np.abs(b.limit) <= (n + 1) * b.step]:
            axes[axis].axvline(edge, color=SECOND, lw=1.2)
        axes[axis].set(title=f"middle of the particle in {'xy'[axis]}",
                       xlabel="px; dashed: the search, solid: the image")
    axes[0].set_ylabel("particles")
    axes[2].hist(run.pose_columns["alpha"] % 360, 36, range=(0, 360), color="#69a9ae")
    axes[2].set(title=f"angle; {run.pose_columns['mirror'].mean():.0%} mirrored", xlabel="alpha, degrees",
                xticks=range(0, 361, 90))
    return figure


def members(run, k, most):
    """See :meth:`mrefali.results.Run.members`."""
    indices = run.choose_members(k, most)
    if not indices.size:
        raise InputError(f"class {k} has no particle: see run.counts")
    raw, moved = run.read_members(run.stack(), indices)
    figure = Picture(figsize=(len(indices) * 0.72 + 0.5, 1.75), layout="constrained")
    rows = figure.subplots(2, len(indices), squeeze=False)
    for row, images in zip(rows, (moved, raw), strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(pictures.grey(image), cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
    for axes, index in zip(rows[0], indices, strict=True):
        axes.set_title(index, fontsize=8)
    for axes, label in zip(rows[:, 0], ("moved", "raw"), strict=True):
        axes.set_ylabel(label, fontsize=8)
    return figure


def groups(rows, criteria):
    """What criteria of the number of classes say, a panel each, with the number that each prefers.

    Parameters
    ----------
    rows : list of dict
        One a number of classes ``K``.
    criteria : dict of str to (str, int)
        Title to name in the rows and the ``K`` preferred.

    Returns
    -------
    Picture
    """
    figure, axes = _figure(len(criteria), 3.0, 2.6)
    numbers = [row["K"] for row in rows]
    for one, (title, (name, best)) in zip(axes, criteria.items(), strict=True):
        one.plot(numbers, [row[name] for row in rows], "o-", color=INK, ms=3)
        one.axvline(best, color=SECOND, ls="--", lw=1.2)
        one.set(title=f"{title}: {best}", xlabel="classes")
        one.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _figure(n_panels, width, height):
    """A figure of panels side by side, with quiet axes."""
    figure = Picture(figsize=(n_panels * width, height), layout="constrained")
    panels = figure.subplots(1, n_panels, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.title.set_fontsize(9)
        axes.xaxis.label.set_fontsize(8)
    return figure, panels


def run_html(run):
    """What Jupyter shows of a run: what it is, and its largest classes."""
    shown = run.by_size[:SHOWN_CLASSES]
    picture = base64.b64encode(montage(*_tiles(run, shown), min(8, len(shown)))._repr_png_()).decode("ascii")
    rest = f", the largest {len(shown)} of them here" if len(shown) < run.n_references else ""
    return (f"<div><p><b>{html.escape(run.path)}</b>: {run.n_particles} particles, {run.n_references} classes{rest}; "
            f"{run.state}, {run.n_iterations} iterations. Below each average: number, particles, resolution at an FRC "
            f'of 0.5 and 0.143.</p><img alt="class averages" src="data:image/png;base64,{picture}"></div>')
