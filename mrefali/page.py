"""The page of a run: one HTML file that needs nothing else, no network either (the command ``report``).

What comes from files, names and headers included, reaches the page through jinja2's escaping alone. Imports results,
findings and pictures of ours.
"""

import base64
import hashlib
import logging
import math
import os
import re
from pathlib import Path

import numpy as np

from mrefali import pictures
from mrefali.errors import REFUSALS, one_line
from mrefali.findings import borders, findings, started_centered
from mrefali.io import replacing
from mrefali.results import Run, missing_for_pictures, open_run, require_pictures

logger = logging.getLogger(__name__)

#: Bytes of all pictures of a page as they stand in it, so that 200 classes stay below 10 MB.
PICTURES_BYTES = 8_000_000

#: Share of a class's bytes that its average may take (members take what is left), its largest side in px, and its
#: quality as a JPEG.
AVERAGE_SHARE, AVERAGE_SIDE, AVERAGE_QUALITY = 0.4, 256, 90

#: Most members shown of a class, their largest side in px, and their quality.
MEMBERS, MEMBER_SIDE, MEMBER_QUALITY = 12, 80, 60

#: Characters of three bytes in base64.
BASE64 = 4 / 3

ANGLE_BINS, MOST_SHIFT_BINS = 36, 60


def report(outdir):
    """Write ``OUTDIR/report.html``, the page of a run, anew.

    Parameters
    ----------
    outdir : str
        Of a run that has finished an iteration at least.

    Returns
    -------
    str
        Its path.

    Raises
    ------
    InputError, FileNotFoundError, PermissionError
    """
    require_pictures("the report")
    run = open_run(outdir)
    path = write_page(run)
    logger.info("%s: the page of the run, to open in any browser", path)
    return path


def write_page(run, stack=None, live=False):
    """Write the page of a ``Run``; its path.

    Parameters
    ----------
    run : Run
    stack : optional
        The particles, where they are open already.
    live : bool
        Whether the page is to load itself anew from time to time.
    """
    path = os.path.join(run.path, "report.html")
    page = _render(run, stack, live)
    with replacing(path) as temporary:
        Path(temporary).write_text(page, "utf-8")
    return path


class Reporter:
    """The page of a run at work, at the root.

    What fails in the page of an unfinished run must not end hours of work: it is said at once, the run goes on without
    a page, and :meth:`finish` raises it when everything else is on disk.

    Parameters
    ----------
    outdir : str
    stack
        The particles.
    live : bool
        Whether to write the page after every iteration.
    """

    def __init__(self, outdir, stack, live):
        self._outdir, self._stack, self._live = outdir, stack, live
        self._failure = None

    def refresh(self):
        """Write the page of the iterations that are finished, if it is to be live."""
        if self._live and self._failure is None:
            try:
                write_page(Run(self._outdir), self._stack, live=True)
            except Exception as error:
                self._failure = error
                logger.warning("the report failed (%s: %s): the run goes on without it", type(error).__name__,
                               one_line(error))

    def finish(self):
        """Write the page of the finished run, or say how to get one."""
        if self._failure is not None:
            raise self._failure
        missing = missing_for_pictures()
        if missing:
            logger.info("for a page of pictures: pip install 'mrefali[viz]', then mrefali report %s", self._outdir)
        else:
            logger.info("the page of the run: %s", write_page(Run(self._outdir), self._stack))


# --- the page


def _render(run, stack, live):
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    environment.filters |= {"resolution": run.in_words, "percent": _percent}
    folder = Path(__file__).parent
    script, style = ((folder / f"page.{kind}").read_text("utf-8") for kind in ("js", "css"))
    classes, no_members = _classes(run, stack)
    found = findings(run)
    # the log says some of them too
    warnings = [(text, n) for text, n in _warnings(run.log) if not any(text.startswith(title) for title, _ in found)]
    return environment.from_string((folder / "page.html").read_text("utf-8")).render(
        run=run, name=os.path.basename(os.path.abspath(run.path)), live=live, classes=classes, no_members=no_members,
        findings=found, warnings=warnings, times=[run.log[i][0] for i in (0, -1)] if run.log else [],
        last_words=run.log[-1][2] if run.state == "failed" else None, iterations=_iterations(run),
        data=_data(run, classes), style=style, script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())


def _percent(share):
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _classes(run, stack):
    """What the page shows of each class, in order of number, and why there are no members, or None."""
    no_members = None
    if stack is None:
        try:
            stack = run.stack()
        except REFUSALS as error:
            no_members = one_line(error)
    allowance = PICTURES_BYTES / BASE64 / run.n_references
    return [_class(run, k, stack, allowance) for k in range(run.n_references)], no_members


def _class(run, k, stack, allowance):
    vanished = bool(run.vanished[k])
    average = b"" if vanished else _average(run.averages[k], AVERAGE_SHARE * allowance)
    shown = {
        "number": k, "vanished": vanished, "count": int(run.counts[-1, k]),
        "share": run.counts[-1, k] / run.n_particles, "changed": int(run.changed[-1, k]),
        "res05": run.resolution_05_px[-1, k], "res0143": run.resolution_0143_px[-1, k],
        "mean_peak": run.mean_peak[-1, k], "like": run.like[-1, k], "likeness": run.likeness[-1, k],
        "detail": run.detail[-1, k],
        "bar": run.counts[-1, k] / max(run.counts[-1].max(), 1),
        "picture": None if vanished else pictures.data_uri(average),
        "members": None,
    }
    if stack is not None:
        shown["members"] = _members(run, k, stack, allowance - len(average))
    return shown


def _average(image, allowance):
    """The JPEG of an average, as large as the bytes allow."""
    picture, side = pictures.grey(image), AVERAGE_SIDE
    while len(encoded := pictures.jpeg(pictures.fit(picture, side), AVERAGE_QUALITY)) > allowance and side > 16:
        side = side * 3 // 4
    return encoded


def _members(run, k, stack, allowance):
    """Two strips of members, moved and as they are, as many as the bytes allow; None for a class that has none."""
    indices = run.choose_members(k, MEMBERS)
    if not indices.size:
        return None
    side = min(run.box, MEMBER_SIDE)
    raw, moved = ([pictures.fit(pictures.grey(image), side) for image in images]
                  for images in run.read_members(stack, indices))
    kept = np.arange(len(indices))
    while True:
        strips = [pictures.jpeg(pictures.strip([images[i] for i in kept]), MEMBER_QUALITY) for images in (moved, raw)]
        size = sum(map(len, strips))
        if size <= allowance or len(kept) == 1:
            break
        fewer = max(1, min(len(kept) - 1, int(len(kept) * allowance / size)))
        kept = np.unique(np.linspace(0, len(indices) - 1, fewer).round().astype(int))
    return {"moved": pictures.data_uri(strips[0]), "raw": pictures.data_uri(strips[1]),
            "indices": indices[kept].tolist(), "peaks": run.pose_columns["peak"][indices[kept]].tolist()}


def _iterations(run):
    """One dict an iteration, for the table."""
    return [{"number": i, "criterion": run.criterion[i], "changed": run.changed[i].sum() / run.n_particles,
             "smallest": run.counts[i].min(), "median": np.median(run.counts[i]), "largest": run.counts[i].max(),
             "vanished": int(np.isnan(run.resolution_05_px[i]).sum()), "res05": _median(run.resolution_05_px[i])}
            for i in range(run.n_iterations)]


def _median(values):
    """Of those that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return np.median(known) if known.size else np.nan


def _warnings(log):
    """Warnings of a log, a list of (message, number of times before); those that differ in numbers only count once."""
    last = {}
    for _, level, message in log:
        if level == "WARNING":
            kind = re.sub(r"\d+(\.\d+)?(, \d+)*", "0", message)
            _, before = last.pop(kind, (None, -1))
            last[kind] = (message, before + 1)
    return list(last.values())


# --- the numbers behind the curves


def _data(run, classes):
    """What the script draws, as JSON takes it."""
    return {
        "pixelSize": run.pixel_size_A, "criterion": _numbers(run.criterion, 6), "nParticles": run.n_particles,
        "frequency": _numbers(np.arange(run.box // 2 + 1) / (2 * (run.box // 2)), 5),
        "shifts": [_shift_histogram(run, axis) for axis in (0, 1)], "angles": _angle_histogram(run),
        "classes": [{
            "number": k, "counts": run.counts[:, k].tolist(), "changed": run.changed[:, k].tolist(),
            "res05": _numbers(run.resolution_05_px[:, k]), "res0143": _numbers(run.resolution_0143_px[:, k]),
            "frc": _numbers(run.frc[k, :, 1]), "members": classes[k]["members"],
        } for k in range(run.n_references)],
    }


def _numbers(values, digits=4):
    """A list of floats of so many digits; None for NaN."""
    return [None if math.isnan(value) else float(f"{value:.{digits}g}") for value in values]


def _shift_histogram(run, axis):
    """Shares of the particles by their place in the image, and the borders of the search."""
    place, b = run.centers[1][:, axis], borders(run, axis)
    farthest = max(np.abs(place).max(), np.abs(b.reach).max(), 1.0)
    width = b.step * max(1, math.ceil(2 * farthest / b.step / MOST_SHIFT_BINS))  # whole steps: no bin is favoured
    n = math.ceil(farthest / width - 0.5)
    edges = (np.arange(-n, n + 2) - 0.5) * width
    counts, _ = np.histogram(place, edges)
    reach = _numbers(b.reach) if started_centered(run) and b.reach[1] > b.reach[0] else []
    return {"axis": "xy"[axis], "edges": _numbers(edges), "shares": _numbers(counts / len(place)), "reach": reach,
            "limit": [edge for edge in _numbers(b.limit) if abs(edge) <= edges[-1] + width]}


def _angle_histogram(run):
    counts, edges = np.histogram(run.pose_columns["alpha"] % 360, ANGLE_BINS, (0, 360))
    return {"edges": _numbers(edges), "shares": _numbers(counts / run.n_particles),
            "mirrored": float(np.mean(run.pose_columns["mirror"]))}
