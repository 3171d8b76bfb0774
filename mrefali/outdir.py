"""What a run writes into its output directory (INTERFACES of the files: README, "What comes out").

May import io, geometry and refine's dataclasses; knows nothing of the search.
"""

import csv
import json
import logging
import os
from contextlib import contextmanager

import numpy as np

from mrefali.io import Content, replacing, write_images, write_mrcs, write_stack
from mrefali.io.content import write_star
from mrefali.io.star import cautions

logger = logging.getLogger(__name__)
details = logging.getLogger("mrefali.details")  # for the log of the run alone

POSE_COLUMNS = ("index", "assign", "alpha", "sx", "sy", "mirror", "peak", "changed")
HISTORY_COLUMNS = ("iteration", "class", "count", "changed", "resolution_0.5_px", "resolution_0.143_px",
                   "filter_cutoff", "filter_falloff", "center_x", "center_y", "criterion")

#: Rows of a table that are made ready together: as Python's numbers they take six times their memory.
ROWS_AT_ONCE = 4096


class OutputDirectory:
    """A run's directory; made on entering, its log closed on leaving.

    Every file is there whole or not at all, but for the log and ``history.csv``, which grow. The last line of the log
    of a run that failed is its exception.

    Parameters
    ----------
    path : str
    pixel_size_A : float or None
        For the headers of the averages.
    """

    def __init__(self, path, pixel_size_A):
        self.path, self.pixel_size_A = path, pixel_size_A
        self._log = None

    def __enter__(self):
        os.mkdir(self.path)
        self._log = logging.FileHandler(self._file("mrefali.log"), encoding="utf-8", errors="backslashreplace")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        self._levels = {}
        # the details go into the file alone, whatever handlers the caller has
        for logger, level in ((logging.getLogger("mrefali"), logging.INFO), (details, logging.DEBUG)):
            self._levels[logger] = logger.level
            logger.addHandler(self._log)
            logger.setLevel(level)
        details.propagate = False
        return self

    def __exit__(self, kind, error, _):
        if error is not None:
            details.error("the run ended by %s: %s", kind.__name__, " ".join(str(error).split()))
        for logger, level in self._levels.items():
            logger.removeHandler(self._log)
            logger.setLevel(level)
        self._log.close()

    def _file(self, name):
        return os.path.join(self.path, name)

    @contextmanager
    def _open_new(self, name):
        """A text file to write, which gets its name once it is whole."""
        with replacing(self._file(name)) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            yield file

    def write_parameters(self, parameters):
        """``parameters.json``: every option and version, a dict."""
        with self._open_new("parameters.json") as file:
            json.dump(parameters, file, indent=1)
            file.write("\n")

    def write_start(self, assign, poses):
        """``poses_before.csv``: the headers as they were; ``assign`` may be None."""
        self._write_poses("poses_before.csv", assign, poses)

    def write_iteration(self, iteration):
        """``aqmIII.hdf``, ``drmIIIRRRR.txt``, the rows of ``history.csv``, and ``poses.csv`` anew."""
        self._write_averages(f"aqm{iteration.number:03d}.hdf", iteration)
        for k, c in enumerate(iteration.classes):
            if not c.vanished:
                with self._open_new(f"drm{iteration.number:03d}{k:04d}.txt") as file:
                    np.savetxt(file, c.frc, "%12.6f %12.7f %10d")
        path = self._file("history.csv")
        with open(path, "a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(HISTORY_COLUMNS)
            writer.writerows(_history(iteration))
        self._write_poses("poses.csv", iteration.assign, iteration.poses, iteration.peak, iteration.changed)

    def write_end(self, iteration):
        """``multi_ref.hdf``, of the last iteration."""
        self._write_averages("multi_ref.hdf", iteration)

    def write_particles(self, stack, poses, assign):
        """``particles.star``: the particles of a stack that is never written to, with their new poses and classes.

        Where the particles are in no MRC file their pixels are copied into ``particles.mrcs``.

        Returns
        -------
        str
            The STAR's path.
        """
        path, (ctf, applied) = self._file("particles.star"), stack.known_ctf()
        content = Content(stack, np.arange(stack.n_images), poses, assign, ctf, applied, stack.box, stack.pixel_size_A)
        write_star(path, content)
        for line in cautions(content):
            logger.info("%s: %s", path, line)
        return path

    def write_average_images(self, iteration):
        """``class_averages.mrcs``, of the last iteration."""
        averages = iteration.averages
        write_mrcs(self._file("class_averages.mrcs"), [averages], *averages.shape[:2], self.pixel_size_A)

    def write_poses_stack(self, stack, matrices, assign):
        """``poses.hdf``: the whole stack with its new poses and classes, where they cannot be written back.

        Returns
        -------
        str
            Its path.
        """
        path = self._file("poses.hdf")
        write_images(path, ((stack.read(i, i + 1)[0], stack.header(i) | {"xform.align2d": matrices[i],
                                                                         "assign": int(assign[i])})
                            for i in range(stack.n_images)), self.pixel_size_A)
        return path

    def _write_averages(self, name, iteration):
        headers = [{"ave_n": c.count, "members": c.members if len(c.members) else None} for c in iteration.classes]
        write_stack(self._file(name), iteration.averages, headers, self.pixel_size_A)

    def _write_poses(self, name, assign, poses, peak=None, changed=None):
        columns = [np.arange(len(poses)), assign, poses["alpha"], poses["sx"], poses["sy"], poses["mirror"], peak,
                   None if changed is None else changed.astype(int)]
        kept = [(label, c) for label, c in zip(POSE_COLUMNS, columns, strict=True) if c is not None]
        with self._open_new(name) as file:
            writer = csv.writer(file)
            writer.writerow([label for label, _ in kept])
            for first in range(0, len(poses), ROWS_AT_ONCE):
                writer.writerows(zip(*[c[first:first + ROWS_AT_ONCE].tolist() for _, c in kept], strict=True))


def _history(iteration):
    changed = np.bincount(iteration.assign[iteration.changed], minlength=len(iteration.classes))
    for k, c in enumerate(iteration.classes):
        row = [iteration.number, k, c.count, int(changed[k])]
        row += ["", ""] if c.vanished else [resolution_px(c.frc, 0.5), resolution_px(c.frc, 0.143)]
        row += ["", ""] if c.filter is None else [c.filter.cutoff, c.filter.falloff]
        row += ["", ""] if c.shift is None else [-float(c.shift[0]), -float(c.shift[1])]
        yield [*row, iteration.criterion]


def resolution_px(frc, threshold):
    """Period in px at which a FRC first falls below ``threshold``, linear between its rings.

    Parameters
    ----------
    frc : (n_rings, 3) float64
        See :func:`mrefali.average.frc`.

    Returns
    -------
    float
        2 px, the finest there is, where it never falls.
    """
    frequency, value = frc[1:, 0], frc[1:, 1]
    below = np.flatnonzero(value < threshold)
    if not below.size:
        return 2.0
    i = below[0]
    if i == 0:
        return float(1 / frequency[0])
    fraction = (value[i - 1] - threshold) / (value[i - 1] - value[i])
    return float(1 / (frequency[i - 1] + fraction * (frequency[i] - frequency[i - 1])))
