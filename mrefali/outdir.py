"""What a run writes into its output directory (INTERFACES of the files: README, "What comes out").

May import io, geometry and refine's dataclasses; knows nothing of the search.
"""

import csv
import json
import logging
import os
import shutil
from contextlib import contextmanager, suppress

import numpy as np

from mrefali.io import Content, replacing, sync, write_images, write_mrcs, write_stack
from mrefali.io.content import write_star
from mrefali.io.star import cautions

logger = logging.getLogger(__name__)
details = logging.getLogger("mrefali.details")  # for the log of the run alone

POSE_COLUMNS = ("index", "assign", "alpha", "sx", "sy", "mirror", "peak", "changed")
HISTORY_COLUMNS = ("iteration", "class", "count", "changed", "resolution_0.5_px", "resolution_0.143_px",
                   "filter_cutoff", "filter_falloff", "center_x", "center_y", "criterion", "mean_peak", "like",
                   "likeness", "detail", "detail_error")

#: Rows of a table that are made ready together: as Python's numbers they take six times their memory.
ROWS_AT_ONCE = 4096


#: Bytes of a row of ``poses.csv``, of a ring of an FRC curve, of the headers of an average, of a page of a disk.
ROW, RING, HEADERS, PAGE = 120, 31, 3000, 4096


def bytes_needed(n_particles, n_references, box, n_iterations):
    """Room that the files of so many iterations take, and a checkpoint and its successor."""
    average = 4 * box * box + HEADERS
    frc = (RING * (box // 2 + 1) // PAGE + 1) * PAGE
    iteration = n_references * (average + frc + 300) + 4 * n_particles
    tables, state = 3 * ROW * n_particles, n_references * 4 * box * box + 40 * n_particles
    return n_iterations * iteration + n_references * average + tables + 2 * state + 20 * PAGE


class OutputDirectory:
    """A run's directory; made on entering, its log closed on leaving.

    Every file is there whole or not at all, but for the log, which grows. The last line of the log of a run that
    failed is its exception. Until :meth:`begin` has returned, an exception removes the directory.

    Parameters
    ----------
    path : str
    pixel_size_A : float or None
        For the headers of the averages.
    log_bytes : int, optional
        The directory is there, and its log is cut to this length: what follows is of an iteration that was not
        finished.
    """

    def __init__(self, path, pixel_size_A, log_bytes=None):
        self.path, self.pixel_size_A = path, pixel_size_A
        self._log_bytes, self._begun, self._log = log_bytes, log_bytes is not None, None

    def __enter__(self):
        if not self._begun:
            os.mkdir(self.path)
        try:
            self._open_log()
        except BaseException:
            self._remove_unless_begun()
            raise
        return self

    def _open_log(self):
        name = self._file("mrefali.log")
        if self._begun and os.path.exists(name):
            os.truncate(name, min(self._log_bytes, os.path.getsize(name)))
        self._log = _Log(name, encoding="utf-8", errors="backslashreplace")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        self._levels = {}
        # the details go into the file alone, whatever handlers the caller has
        for logger, level in ((logging.getLogger("mrefali"), logging.INFO), (details, logging.DEBUG)):
            self._levels[logger] = logger.level
            logger.addHandler(self._log)
            logger.setLevel(level)
        details.propagate = False

    def __exit__(self, kind, error, _):
        if error is not None:
            with suppress(OSError):  # what ended the run may be that nothing can be written
                details.error("the run ended by %s: %s", kind.__name__, " ".join(str(error).split()))
        for logger, level in self._levels.items():
            logger.removeHandler(self._log)
            logger.setLevel(level)
        with suppress(OSError):
            self._log.close()
        if error is not None:
            self._remove_unless_begun()

    def _remove_unless_begun(self):
        if not self._begun:
            shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, name):
        return os.path.join(self.path, name)

    @contextmanager
    def _open_new(self, name):
        """A text file to write, which gets its name once it is whole."""
        with replacing(self._file(name)) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def begin(self, parameters, assign, poses):
        """``parameters.json`` and, unless the run goes on, ``poses_before.csv`` and a folder for the checkpoint.

        Parameters
        ----------
        parameters : dict
            Every option and version.
        assign, poses
            The headers as they were; ``assign`` may be None.
        """
        self.write_parameters(parameters)
        if not self._begun:
            self.write_start(assign, poses)
            os.mkdir(self._file("checkpoint"))

    def has_begun(self):
        """Have the directory stay from now on, whatever happens."""
        self.sync()
        self._begun = True

    def sync(self):
        """Have the names of all files on the disk, and say how long the log is, in bytes."""
        self._log.flush()
        sync(self.path)
        return os.path.getsize(self._file("mrefali.log"))

    def write_parameters(self, parameters):
        """``parameters.json``: every option and version, a dict."""
        with self._open_new("parameters.json") as file:
            json.dump(parameters, file, indent=1)
            file.write("\n")

    def write_start(self, assign, poses):
        """``poses_before.csv``: the headers as they were; ``assign`` may be None."""
        self._write_poses("poses_before.csv", assign, poses)

    def write_iteration(self, iteration):
        """``aqmIII.hdf``, ``drmIIIRRRR.txt``, and ``history.csv`` and ``poses.csv`` anew."""
        self._write_averages(f"aqm{iteration.number:03d}.hdf", iteration)
        for k, c in enumerate(iteration.classes):
            if not c.vanished:
                with self._open_new(f"drm{iteration.number:03d}{k:04d}.txt") as file:
                    np.savetxt(file, c.frc, "%12.6f %12.7f %10d")
        self._write_history(iteration)
        self._write_poses("poses.csv", iteration.assign, iteration.poses, iteration.peak, iteration.changed)

    def write_end(self, number):
        """``multi_ref.hdf``: the averages after iteration ``number``."""
        with replacing(self._file("multi_ref.hdf")) as temporary:
            shutil.copyfile(self._file(f"aqm{number:03d}.hdf"), temporary)
            sync(temporary)

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

    def write_groups(self, rows):
        """``groups.csv``: a row a number of classes, dicts of the same names."""
        with self._open_new("groups.csv") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def write_average_images(self, averages):
        """``class_averages.mrcs``, of the last iteration."""
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

    def _write_history(self, iteration):
        """All rows of ``history.csv``: those of earlier iterations as they stand there, and those of this one."""
        name, rows = self._file("history.csv"), [HISTORY_COLUMNS]
        if iteration.number > 0:
            with open(name, encoding="utf-8", newline="") as file:
                earlier = [row for row in list(csv.reader(file))[1:] if int(row[0]) < iteration.number]
            # a run that an older version began has fewer columns
            rows += [row + [""] * (len(HISTORY_COLUMNS) - len(row)) for row in earlier]
        with self._open_new("history.csv") as file:
            csv.writer(file).writerows([*rows, *_history(iteration)])

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


class _Log(logging.FileHandler):
    def handleError(self, record):
        """A log that cannot be written ends the run, as any other file would."""
        raise


def _history(iteration):
    changed = np.bincount(iteration.assign[iteration.changed], minlength=len(iteration.classes))
    peaks = np.bincount(iteration.assign, iteration.peak, len(iteration.classes))
    for k, c in enumerate(iteration.classes):
        row = [iteration.number, k, c.count, int(changed[k])]
        row += ["", ""] if c.vanished else [resolution_px(c.frc, 0.5), resolution_px(c.frc, 0.143)]
        row += ["", ""] if c.filter is None else [c.filter.cutoff, c.filter.falloff]
        row += ["", ""] if c.shift is None else [-float(c.shift[0]), -float(c.shift[1])]
        row += [iteration.criterion, float(peaks[k] / c.count) if c.count else ""]
        row += ["" if c.like is None else c.like]
        yield [*row, *("" if np.isnan(value) else value for value in (c.likeness, c.detail, c.detail_error))]


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
