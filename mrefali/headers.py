"""Headers of a stack set, numbered, drawn at random, and exchanged with tables of text.

A table has one row an image, in the order of the stack. Without a comma in its first line its columns stand in the
order of the headers asked for, separated by blanks; otherwise it is CSV, whose first line names the columns. May
import io, ctf, geometry and errors; must never import the search, the averages or numba.
"""

import csv
import difflib
import logging
import re
from dataclasses import dataclass

import numpy as np

from mrefali.ctf import CTF_PARAMETERS, check_ctf, format_ctf, parse_ctf
from mrefali.errors import InputError
from mrefali.geometry import identity_poses, make_poses, to_matrices
from mrefali.io import open_stack

logger = logging.getLogger(__name__)

POSE_HEADER = "xform.align2d"

#: Names so near to one of these are taken for misspelt.
KNOWN_HEADERS = (POSE_HEADER, "assign", "ctf_applied")

#: Headers that take several columns, with the columns' names.
COLUMNS = {
    POSE_HEADER: ("alpha", "sx", "sy", "mirror", "scale"),
    "ctf": ("defocus", "cs", "voltage", "apix", "bfactor", "ampcont", "dfdiff", "dfang"),
}

#: Which of ``CTF_PARAMETERS`` stands in each column of a CTF.
CTF_FIELDS = ("defocus_um", "cs_mm", "voltage_kV", "pixel_size_A", "bfactor_A2", "ampcont_percent", "dfdiff_um",
              "dfang_deg")

#: Headers that say how to read the pixels, or what is in them; a wrong one spoils the stack.
OF_THE_PIXELS = re.compile("nx|ny|nz|datatype|is_complex|is_complex_ri|all_int|minimum|maximum|mean|sigma|square_sum|"
                           "mean_nonzero|sigma_nonzero|stored_.*")

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

#: Half the width, in px, of the shifts that are drawn at random.
RANDOM_SHIFT = 2.0

#: Two angles closer than this, in radians, are one that was converted to degrees and back.
SAME_ANGLE_RAD = 1e-14


def header(stack, params, *, zero=False, one=False, consecutive=False, randomize=False, import_=None, export=None,
           print_=False, rand_seed=1000):
    """Set, import, export or print headers of every image of a stack; exactly one of the actions.

    Parameters
    ----------
    stack : str
        Its pixels and all other headers stay as they are.
    params : str
        Names of headers, separated by commas or blanks.
    zero : bool
        0; the identity for ``xform.align2d``.
    one : bool
        1.
    consecutive : bool
        0, 1, 2, ...
    randomize : bool
        For ``xform.align2d`` alone: see :func:`random_poses`.
    import_ : str, optional
        Table to read, see :func:`read_table`.
    export : str, optional
        Table to write, see :func:`format_table`; must not exist.
    print_ : bool
        Print the table instead.
    rand_seed : int
        The same seed draws the same poses.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
        Before any header is changed.
    """
    names = _split(params)
    action = _only_one({"zero": zero, "one": one, "consecutive": consecutive, "randomize": randomize,
                        "import": import_, "export": export, "print": print_}, names)
    images = open_stack(stack)
    if action == "print":
        print(format_table(images, names), end="")
    elif action == "export":
        _write_new(export, format_table(images, names))
        logger.info("%s: %s of the %d images of %s", export, ", ".join(names), images.n_images, stack)
    else:
        _check_settable(names, action)
        columns = (read_table(import_, names, images.n_images) if action == "import" else
                   {name: _values(name, action, images.n_images, rand_seed) for name in names})
        images.write_columns(columns)
        logger.info("%s: %s of %d images %s", stack, ", ".join(names), images.n_images, {
            "zero": "set to the identity" if names == [POSE_HEADER] else "set to zero", "one": "set to 1",
            "consecutive": f"numbered 0 to {images.n_images - 1}", "randomize": f"drawn with rand_seed={rand_seed}",
            "import": f"imported from {import_}"}[action])


def random_poses(n_particles, seed):
    """``(n_particles,) POSE``: alpha uniform in [0, 360), sx and sy in +-2 px, each mirrored with probability 1/2.

    The same ``seed`` draws the same poses.
    """
    rng = np.random.default_rng(seed)
    alpha = rng.uniform(0, 360, n_particles)
    sx, sy = rng.uniform(-RANDOM_SHIFT, RANDOM_SHIFT, (2, n_particles))
    return make_poses(alpha, sx, sy, rng.integers(2, size=n_particles))


# --- the call


def _split(params):
    names = re.findall(r"[^\s,]+", params)
    if not names:
        raise InputError(f"params={params} names no header: give names such as xform.align2d,assign")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"params={params} names {name} twice: name each header once")
        meant = difflib.get_close_matches(name, KNOWN_HEADERS, 1, 0.8)
        if name.startswith("xform.") and name != POSE_HEADER or meant and name not in KNOWN_HEADERS:
            raise InputError(f"params={name} is not known: did you mean {meant[0] if meant else POSE_HEADER}?")
    return names


def _only_one(actions, names):
    """The name of the one action that is asked for."""
    given = [action for action, value in actions.items() if value is not None and value is not False]
    if len(given) != 1:
        what = f"both {given[0]} and {given[1]} are given" if given else "nothing is said to be done"
        raise InputError(f"params={','.join(names)}: {what}; give exactly one of {', '.join(actions)}")
    return given[0]


def _check_settable(names, action):
    for name in names:
        if OF_THE_PIXELS.fullmatch(name):
            raise InputError(f"{name} describes the pixels and cannot be set: the stack could not be read any more")
        if action in ("one", "consecutive") and name == POSE_HEADER:
            raise InputError(f"{action} has no meaning for {name}, a transform: give zero (the identity), randomize "
                             f"or import")
        if action == "randomize" and name != POSE_HEADER:
            raise InputError(f"randomize is for {POSE_HEADER}, not for {name}: give zero, one, consecutive or import")
        if action != "import" and name == "ctf":
            raise InputError(f"{action} has no meaning for ctf, which takes {len(COLUMNS['ctf'])} numbers: import them")


def _values(name, action, n_images, rand_seed):
    """What ``zero``, ``one``, ``consecutive`` or ``randomize`` writes."""
    if action == "randomize":
        if rand_seed < 0:
            raise InputError(f"rand_seed={rand_seed} is not allowed: give a whole number of at least 0")
        return random_poses(n_images, rand_seed)
    if name == POSE_HEADER:
        return identity_poses(n_images)
    return np.arange(n_images) if action == "consecutive" else np.full(n_images, int(action == "one"))


# --- from a stack to a table


def format_table(stack, names):
    """The text of a table of headers, which :func:`read_table` reads.

    Parameters
    ----------
    stack : Stack
        See :mod:`mrefali.io`.
    names : list of str
        ``xform.align2d`` gives the columns alpha (degrees), sx, sy (px), mirror (0 or 1), scale (1.0); ``ctf``
        defocus (um), cs (mm), voltage (kV), apix (A), bfactor (A^2), ampcont (per cent), dfdiff (um), dfang
        (degrees), without the background and SNR curves that may follow them in the header; all else one column.

    Returns
    -------
    str
        Numbers in as many digits as they need to be read back to the bit.

    Raises
    ------
    InputError
        If an image lacks a header or has one that no column can hold.
    """
    columns = [column for name in names for column in _columns(stack, name)]
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return "".join("  ".join(map(str.rjust, row, widths)) + "\n" for row in rows)


def _columns(stack, name):
    """One header of every image as columns of text."""
    if name == POSE_HEADER:
        return _pose_columns(stack)
    values = stack.column(name)
    for i, value in enumerate(values):
        if value is None:
            raise InputError(f"image {i} of {stack.path} has no {name}: leave it out, or set it with mrefali header")
    if name == "ctf":
        parameters = np.array([_parse_ctf(f"image {i} of {stack.path}", text) for i, text in enumerate(values)])
        return [[f"{value:.10g}" for value in parameters[field]] for field in CTF_FIELDS]
    return [[_to_text(f"{name} of image {i} of {stack.path}", value) for i, value in enumerate(values)]]


def _pose_columns(stack):
    poses = stack.poses()
    scale = np.hypot(*np.array(stack.column(POSE_HEADER))[:, 0, :2].T)
    scaled = np.flatnonzero(np.abs(scale - 1) > 1e-3)
    if scaled.size:
        raise InputError(f"{POSE_HEADER} of image {scaled[0]} of {stack.path} has the scale {scale[scaled[0]]:g}: 2-D "
                         f"poses have scale 1; scale the images instead, and set their poses with --zero or --import")
    return [[str(alpha) for alpha in poses["alpha"].tolist()], *(
        [_to_text(axis, value) for value in poses[axis].tolist()] for axis in ("sx", "sy")),
        [str(mirror) for mirror in poses["mirror"].tolist()], ["1.0"] * len(poses)]


def _parse_ctf(where, text):
    try:
        return parse_ctf(str(text))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _to_text(what, value):
    """A header value as one word; float32 in the fewest digits that give it back."""
    if isinstance(value, str):
        if not (re.fullmatch(r"[^\s,]+", value) and value.isprintable()):
            raise InputError(f"{what} is {value!r}: a column holds one printable word an image, without commas")
        return value
    if np.ndim(value):
        raise InputError(f"{what} is a list of {np.size(value)} values: a column holds one number or text an image")
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if not np.isfinite(value):
        raise InputError(f"{what} is {value}: a table holds finite numbers only; set it with mrefali header")
    single = np.float32(value) if abs(value) <= LARGEST_FLOAT32 else np.inf
    return str(single if single == value else float(value))


def _write_new(path, text):
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileExistsError(f"{path} exists: give another name, or remove it first") from None


# --- from a table to headers


@dataclass(frozen=True)
class _Table:
    """Columns of text, {name: one word an image}, and the number of the line each row stands in."""

    path: str
    columns: dict
    lines: list

    def numbers(self, name):
        """A column of finite numbers, (n,) float64."""
        return np.array(self.values(name, text_allowed=False), np.float64)

    def values(self, name, text_allowed=True):
        """A column as whole numbers, as floats if one is no whole number, or as texts if none is a number."""
        words = self.columns[name]
        values = [_to_number(word) for word in words]
        if text_allowed and all(value is None for value in values):
            return words
        for line, word, value in zip(self.lines, words, values, strict=True):
            if value is None or not abs(value) <= LARGEST_FLOAT32:  # NaN fails too
                raise InputError(f"{name} in line {line} of {self.path} is {word!r}: give a finite number")
        return np.array(values)


def read_table(path, names, n_images):
    """Headers from a table of text: as :func:`format_table` writes it, or CSV with named columns.

    A CSV table may have more columns than are asked for, and none for ``scale``; in one called ``index`` the rows
    must be numbered from 0. So ``poses_before.csv`` and ``poses.csv`` of a run can be read.

    Parameters
    ----------
    path : str
    names : list of str
        Headers to read; in a table without names these are its columns, in this order.
    n_images : int
        Rows that there must be.

    Returns
    -------
    dict
        As :meth:`mrefali.io.HdfStack.write_columns` takes it: int32 for whole numbers, else float32 or text.

    Raises
    ------
    InputError, FileNotFoundError
    """
    table = _read_columns(path, [column for name in names for column in COLUMNS.get(name, (name,))], n_images)
    readers = {POSE_HEADER: _read_poses, "ctf": _read_ctf}
    return {name: readers[name](table) if name in readers else table.values(name) for name in names}


def _read_columns(path, wanted, n_images):
    """The ``_Table`` of a file, which has at least the ``wanted`` columns and ``n_images`` rows."""
    lines = [(number, line) for number, line in enumerate(_read_text(path).splitlines(), 1) if line.strip()]
    named = bool(lines) and "," in lines[0][1]
    if named:
        rows = [(number, [field.strip() for field in next(csv.reader([line]))]) for number, line in lines]
        names = rows.pop(0)[1]
    else:
        rows, names = [(number, line.split()) for number, line in lines], wanted
    for number, row in rows:
        if len(row) != len(names):
            raise InputError(f"line {number} of {path} has {len(row)} columns: give {len(names)} ({', '.join(names)})")
    if len(rows) != n_images:
        raise InputError(f"{path} has {len(rows)} rows for {n_images} images: give one row for each image")
    columns = dict(zip(names, zip(*(row for _, row in rows), strict=True), strict=False))
    columns.setdefault("scale", ("1.0",) * n_images)
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise InputError(f"{path} has no column {missing[0]}: it has {', '.join(names)}")
    table = _Table(path, columns, [number for number, _ in rows])
    if named and "index" in names:
        _check_index(table)
    return table


def _read_text(path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: give a table, as --export writes it") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text: give a table, as --export writes it") from None


def _check_index(table):
    for i, (line, index) in enumerate(zip(table.lines, table.columns["index"], strict=True)):
        if _to_number(index) != i:
            raise InputError(f"index in line {line} of {table.path} is {index!r}, not {i}: give the rows in the order "
                             f"of the images, numbered from 0")


def _to_number(word):
    """A word as int or float, None if it is no number."""
    if re.fullmatch("[+-]?[0-9]{1,18}", word):
        return int(word)
    try:
        return None if "_" in word else float(word)
    except ValueError:
        return None


def _read_poses(table):
    """``(n, 3, 4) float32``, see :func:`nearest_matrices`."""
    alpha, sx, sy, mirror, scale = (table.numbers(name) for name in COLUMNS[POSE_HEADER])
    for name, column, allowed, right in (
            ("mirror", mirror, "0 or 1", (mirror == 0) | (mirror == 1)),
            ("scale", scale, "1, the scale of every 2-D pose", np.abs(scale - 1) <= 1e-3)):
        for row in np.flatnonzero(~right)[:1]:
            raise InputError(f"{name} in line {table.lines[row]} of {table.path} is {column[row]:g}: give {allowed}")
    return nearest_matrices(make_poses(alpha, sx, sy, mirror))


def _read_ctf(table):
    columns = dict(zip(CTF_FIELDS, map(table.numbers, COLUMNS["ctf"]), strict=True))
    parameters = np.zeros(len(table.lines), CTF_PARAMETERS)
    for field, column in columns.items():
        parameters[field] = column
    for line, one in zip(table.lines, parameters, strict=True):
        try:
            check_ctf(one)
        except InputError as error:
            raise InputError(f"line {line} of {table.path}: {error}") from None
    return [format_ctf(one) for one in parameters]


def nearest_matrices(poses):
    """The float32 matrices that poses came from, if they came from such.

    The angle of a matrix whose cosine and sine were rounded to float32 has, in turn, a cosine and sine that may
    round to other neighbours. So where cosine and sine, each moved by at most one unit in the last place, have
    alpha itself as their angle, these are taken; all else is rounded as usual.

    Parameters
    ----------
    poses : (n,) POSE

    Returns
    -------
    (n, 3, 4) float32
    """
    alpha = np.deg2rad(poses["alpha"])
    exact_cosine, exact_sine = np.cos(alpha), np.sin(alpha)
    cosine, sine = (np.stack([x, np.nextafter(x, np.float32(-2)), np.nextafter(x, np.float32(2))])
                    for x in (np.float32(exact_cosine), np.float32(exact_sine)))
    cosine, sine = np.repeat(cosine, 3, axis=0), np.tile(sine, (3, 1))  # all nine pairs, the rounded one first
    error = np.abs(cosine * exact_sine - sine * exact_cosine)  # sine of the angle between, in float64
    chosen = np.argmin(error > SAME_ANGLE_RAD, axis=0), np.arange(len(poses))
    cosine, sine = cosine[chosen], sine[chosen]
    sign = np.where(poses["mirror"] != 0, np.float32(-1), np.float32(1))
    matrices = to_matrices(poses).astype(np.float32)
    matrices[:, 0, 0], matrices[:, 0, 1] = sign * cosine, sign * sine
    matrices[:, 1, 0], matrices[:, 1, 1] = -sine, cosine
    return matrices
