"""What a run left in its output directory, as arrays and tables (:func:`open_run`).

Reads files only, and of a run that goes on those of its finished iterations. Imports io, average and geometry of ours;
pandas, and plots, only where they are asked for.
"""

import csv
import datetime
import importlib.util
import json
import math
import os
import re
from functools import cached_property

import numpy as np

from mrefali import average, geometry
from mrefali.errors import InputError
from mrefali.io import is_bdb, open_stack

#: What ``pip install 'mrefali[viz]'`` brings, by the names of import.
VIZ = ("matplotlib", "pandas", "jinja2", "PIL")

#: Columns of ``history.csv`` that the first runs do not have.
HEALTH_COLUMNS = ("mean_peak", "like", "likeness", "detail", "detail_error")

LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+) (\w+) +(.*)")


def missing_for_pictures():
    """Names of the packages of ``[viz]`` that are not installed."""
    return [name for name in VIZ if importlib.util.find_spec(name) is None]


def require_pictures(what):
    """Raise InputError unless all of ``[viz]`` is installed; ``what`` needs it."""
    missing = missing_for_pictures()
    if missing:
        raise InputError(f"{what} needs {', '.join(missing)}: pip install 'mrefali[viz]'")


def open_run(outdir):
    """The run whose output directory is ``outdir``, finished or not.

    Returns
    -------
    Run

    Raises
    ------
    InputError, FileNotFoundError
        If there is no such directory, or no run of mrefali in it.
    """
    return Run(outdir)


class Run:
    """A run as it stood when it was opened; open it again to see what came after.

    Attributes
    ----------
    path : str
        Its output directory.
    parameters : dict
        Every option and version (``parameters.json``).
    n_particles, n_references, n_iterations : int
        ``n_iterations`` are finished.
    box : int, px
    pixel_size_A : float or None
        None where it is not known; EMAN2 writes 1.0 there.
    counts, changed : (n_iterations, n_references) int64
        Particles of each class, and how many of them came from another in that iteration.
    resolution_05_px, resolution_0143_px : (n_iterations, n_references) float64
        Period at which the FRC first falls below 0.5 and below 0.143; 2 where it never falls, NaN for a class that
        vanished.
    criterion : (n_iterations,) float64
    mean_peak : (n_iterations, n_references) float64
        Of the particles of each class; NaN for one that has none.
    like, likeness, detail, detail_error : (n_iterations, n_references) float64
        As in :class:`mrefali.health.Health`; NaN where there is nothing to say. All five are NaN where an older version
        wrote the history.
    """

    def __init__(self, outdir):
        self.path = os.fspath(outdir)
        self.parameters = _read_parameters(self.path)
        self.n_particles, self.n_references, self.box = (
            self.parameters[name] for name in ("n_particles", "n_references", "box"))
        size = self.parameters["pixel_size_A"]
        self.pixel_size_A = None if size == 1.0 else size
        self._columns = _read_history(os.path.join(self.path, "history.csv"), self.n_references)
        self.n_iterations = len(self._columns["iteration"]) // self.n_references
        self.counts, self.changed = (self._by_class(name).astype(np.int64) for name in ("count", "changed"))
        self.resolution_05_px = self._by_class("resolution_0.5_px")
        self.resolution_0143_px = self._by_class("resolution_0.143_px")
        self.criterion = self._by_class("criterion")[:, 0]
        self.mean_peak, self.like, self.likeness, self.detail, self.detail_error = map(self._by_class, HEALTH_COLUMNS)

    def __repr__(self):
        return (f"<mrefali.Run {self.path}: {self.n_particles} particles, {self.n_references} classes, "
                f"{self.n_iterations} iterations, {self.state}>")

    def _by_class(self, name):
        return self._columns[name].reshape(-1, self.n_references)

    def _file(self, name):
        return os.path.join(self.path, name)

    def require_iteration(self):
        """Raise InputError unless an iteration is finished."""
        if not self.n_iterations:
            raise InputError(f"{self.path}: no iteration is finished yet: see mrefali watch {self.path}")

    # --- the state of the run

    @cached_property
    def log(self):
        """The log, a list of (``datetime``, level, message), in order of time."""
        entries = []
        with open(self._file("mrefali.log"), encoding="utf-8", errors="replace") as file:
            for line in file.read().splitlines():
                match = LOG_LINE.fullmatch(line)
                if match:
                    entries.append((datetime.datetime.fromisoformat(match[1].replace(",", ".")), match[2], match[3]))
                elif entries:  # a message of several lines
                    entries[-1] = (*entries[-1][:2], f"{entries[-1][2]}\n{line}")
        return entries

    @property
    def state(self):
        """``finished``, ``failed``, or ``unfinished``: at work, or ended so that it could not say why."""
        if self.log and self.log[-1][1] == "ERROR":
            return "failed"
        return "finished" if os.path.exists(self._file("multi_ref.hdf")) else "unfinished"

    @property
    def maxit(self):
        """Iterations that were asked for at most, int."""
        # of all stages; runs from before there were any say what one has
        return self.parameters.get("most_iterations", self.parameters["maxit"] or 10)

    @property
    def vanished(self):
        """(n_references,) bool: classes for which the last iteration made no average, of fewer than four particles."""
        self.require_iteration()
        return np.isnan(self.resolution_05_px[-1])

    @property
    def by_size(self):
        """Classes from the largest to the smallest, equal ones in order of number, (n_references,) int64."""
        self.require_iteration()
        return np.argsort(-self.counts[-1], kind="stable")

    def in_words(self, resolution_px):
        """A resolution in Angstrom, or px where the pixel size is not known; ``≤`` where only the pixels limit it."""
        if math.isnan(resolution_px):
            return "–"
        sign = "≤ " if resolution_px <= 2.0 else ""
        size, unit = (1.0, "px") if self.pixel_size_A is None else (self.pixel_size_A, "Å")
        return f"{sign}{resolution_px * size:.1f} {unit}"

    # --- tables and arrays

    @cached_property
    def averages(self):
        """The class averages after the last iteration, (n_references, box, box) float32.

        Of a class that vanished it is what replaces it as a reference.
        """
        self.require_iteration()
        return open_stack(self._file(f"aqm{self.n_iterations - 1:03d}.hdf")).read(0, self.n_references)

    @cached_property
    def frc(self):
        """FRC of the last iteration, (n_references, n_rings, 3) float64.

        Frequency in 1/px, correlation, number of coefficients; NaN for a class that vanished.
        """
        curves = np.full((self.n_references, self.box // 2 + 1, 3), np.nan)
        for k in np.flatnonzero(~self.vanished):
            curves[k] = np.loadtxt(self._file(f"drm{self.n_iterations - 1:03d}{k:04d}.txt"), ndmin=2)
        return curves

    @property
    def history(self):
        """``history.csv``: one row an iteration and class, a pandas DataFrame."""
        require_pictures("history")
        import pandas

        whole = {name: "int64" for name in ("iteration", "class", "count", "changed")}
        return pandas.DataFrame(self._columns).astype(whole)

    @property
    def poses(self):
        """``poses.csv``: one row a particle, a pandas DataFrame with the index of the particle as index."""
        require_pictures("poses")
        import pandas

        self.require_iteration()
        whole = {name: "int64" for name in ("index", "assign", "mirror", "changed")}
        return pandas.DataFrame(self.pose_columns).astype(whole).set_index("index")

    @cached_property
    def pose_columns(self):
        """``poses.csv`` as a dict of columns, (n_particles,) float64 each."""
        self.require_iteration()
        return _read_columns(self._file("poses.csv"), self.n_particles)

    @property
    def pose_records(self):
        """The poses after the last iteration, (n_particles,) geometry.POSE."""
        return _poses(self.pose_columns)

    @cached_property
    def centers(self):
        """Where the middle of each particle lies in its image: x, y from pixel n//2, in px; before the run, and where
        the last search found it.

        The search moves the disc of radius ``ou`` over the image of the particle, so this, and not (sx, sy), is what
        its range bounds. The shift that centred the class afterwards is undone.

        Returns
        -------
        before, after : (n_particles, 2) float64
        """
        before = geometry.inverse_shift(_poses(_read_columns(self._file("poses_before.csv"), self.n_particles)))
        # an average that was not moved has no centre in the table
        centers = np.nan_to_num(np.stack([self._by_class(name)[-1] for name in ("center_x", "center_y")], axis=1))
        found = geometry.shifted(self.pose_records, centers[self.pose_columns["assign"].astype(int)])
        return before, geometry.inverse_shift(found)

    # --- particles

    def stack(self):
        """The stack of the particles, where it still is and is the one that was aligned.

        Raises
        ------
        InputError, FileNotFoundError, PermissionError
        """
        path = _place(self.parameters["stack"], self.parameters.get("folder", ""))
        stack = open_stack(path)
        if (stack.n_images, stack.box) != (self.n_particles, self.box):
            raise InputError(f"{path} has {stack.n_images} images of {stack.box} px now, but {self.n_particles} of "
                             f"{self.box} px were aligned: it is another stack")
        return stack

    def choose_members(self, k, most):
        """Indices of at most ``most`` particles of class ``k``, from the best peak to the worst in even steps."""
        if not 0 <= k < self.n_references:
            raise InputError(f"class {k} is not there: give 0 to {self.n_references - 1}")
        members = np.flatnonzero(self.pose_columns["assign"] == k)
        ranked = members[np.argsort(-self.pose_columns["peak"][members], kind="stable")]
        return ranked[np.unique(np.linspace(0, max(len(ranked) - 1, 0), min(most, len(ranked))).round().astype(int))]

    def read_members(self, stack, indices):
        """Particles as they are in their ``stack``, and moved by their poses; (n, box, box) float32 each."""
        images = stack.read_at(indices)
        return images, average.transform(images, self.pose_records[indices])

    # --- pictures

    def montage(self, order="size", columns=None):
        """The class averages with number, count and resolution, a matplotlib figure; ``order`` is size or number."""
        return _plots("montage").run_montage(self, order, columns)

    def plot_frc(self, classes=None):
        """FRC curves of these classes, of the largest twelve if none are named; a matplotlib figure."""
        return _plots("plot_frc").frc(self, classes)

    def plot_convergence(self):
        """Criterion, changes, class sizes and resolution over the iterations, a matplotlib figure."""
        return _plots("plot_convergence").convergence(self)

    def plot_shifts(self):
        """Histograms of where the particles lie, with the borders of the search, and of their angles."""
        return _plots("plot_shifts").shifts(self)

    def members(self, k, most=10):
        """At most ``most`` particles of class ``k``, moved and as they are, a matplotlib figure."""
        return _plots("members").members(self, k, most)

    def _repr_html_(self):
        if missing_for_pictures() or not self.n_iterations:
            return None
        return _plots("a run").run_html(self)


def _plots(what):
    require_pictures(what)
    from mrefali import plots

    return plots


def _read_parameters(path):
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path}: no such directory: give the OUTDIR of a run")
    try:
        with open(os.path.join(path, "parameters.json"), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise InputError(f"{path} has no parameters.json: give the OUTDIR of a run of mref_ali2d") from None
    except ValueError as error:
        raise InputError(f"{path}/parameters.json cannot be read: {error}") from error


def _read_history(path, n_references):
    """Columns of ``history.csv``, float64 with NaN for empty fields; whole iterations only, maybe none."""
    names = ("iteration", "class", "count", "changed", "resolution_0.5_px", "resolution_0.143_px", "filter_cutoff",
             "filter_falloff", "center_x", "center_y", "criterion")
    if not os.path.exists(path):
        return {name: np.empty(0) for name in names + HEALTH_COLUMNS}
    with open(path, encoding="utf-8", newline="") as file:
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # the last may be half written
    rows = list(csv.DictReader(whole))
    rows = rows[:len(rows) // n_references * n_references]
    try:
        columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
        return columns | {name: np.array([float(row.get(name) or "nan") for row in rows]) for name in HEALTH_COLUMNS}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no history of a run: {error!r}") from error


def _read_columns(path, n_rows):
    """Columns of a table of numbers with names in its first line, (n_rows,) float64 each."""
    with open(path, encoding="utf-8") as file:
        names = file.readline().strip().split(",")
        try:
            values = np.loadtxt(file, delimiter=",", ndmin=2)
        except ValueError as error:
            raise InputError(f"{path} is no table of numbers: {error}") from error
    if values.shape != (n_rows, len(names)):
        raise InputError(f"{path} has {values.shape[0]} rows, but {n_rows} particles were aligned")
    return dict(zip(names, values.T, strict=True))


def _poses(columns):
    return geometry.make_poses(*(columns[name] for name in ("alpha", "sx", "sy", "mirror")))


def _place(stack, folder):
    """The name of a stack that was called so in ``folder``."""
    prefix, path = ("bdb:", stack[4:]) if is_bdb(stack) else ("", stack)
    return stack if prefix and path.startswith("~") else prefix + os.path.join(folder, path)
