"""What a stack or a file of class averages holds, as data. Imports io and errors of ours only."""

import os
from collections import Counter
from dataclasses import dataclass

from mrefali.errors import InputError, one_line
from mrefali.io import open_stack


@dataclass(frozen=True)
class Information:
    """What :func:`info` found.

    Attributes
    ----------
    path : str
    n_images : int
    box : int or None, px
        None where the images are of unequal size or not square.
    pixel_size_A : float or None
    obstacle : str or None
        Why the images cannot be aligned.
    headers : dict of str to int
        How many images have each header.
    classes : dict of int to int, or None
        Particles of each class, in order of class; None where no image has ``assign``.
    without_class, not_a_class : int
        Images that lack an ``assign`` which others have, and those whose ``assign`` is no number.
    averages : list of int or None, or None
        ``ave_n`` of every image; None where no image has it.
    """

    path: str
    n_images: int
    box: int | None
    pixel_size_A: float | None
    obstacle: str | None
    headers: dict
    classes: dict | None
    without_class: int
    not_a_class: int
    averages: list | None


def info(file):
    """What the stack ``file`` holds; of a database also where it cannot be aligned.

    Returns
    -------
    Information

    Raises
    ------
    InputError, FileNotFoundError, IsADirectoryError, PermissionError
    """
    obstacle = None
    try:
        stack = open_stack(file)
    except (InputError, OSError) as error:
        obstacle = one_line(error)
        stack = open_stack(file, mixed=True)  # only a database can be listed where it cannot be aligned
    headers = stack.header_names()
    assigns = stack.column("assign") if "assign" in headers else []
    counts = Counter(assign for assign in assigns if isinstance(assign, (int, float)))
    without_class = sum(assign is None for assign in assigns)
    return Information(
        os.fspath(file), stack.n_images, stack.box, stack.pixel_size_A, obstacle, headers,
        dict(sorted(counts.items())) if "assign" in headers else None,
        without_class, len(assigns) - without_class - counts.total(),
        stack.column("ave_n") if "ave_n" in headers else None)
