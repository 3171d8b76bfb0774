"""The kernels, their compiled code kept where this user may write. Imports kernels; all others get them from here.

numba keeps compiled code beside the source, and does not start where it may write neither there nor into the user's own
cache. Here each version of the package and text of the kernels has its own folder, in the user's cache or else among
the temporary files; ``NUMBA_CACHE_DIR`` is another's choice, and stands.
"""

import hashlib
import os
import stat
import tempfile
from contextlib import contextmanager

import numba

from mrefali import __version__


def _folder():
    """An own folder for compiled code; if nothing else can be written to, one for this process alone."""
    with open(os.path.join(os.path.dirname(__file__), "kernels.py"), "rb") as file:
        text = hashlib.sha256(file.read()).hexdigest()[:16]
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for own in (os.path.join(caches, "mrefali"), os.path.join(tempfile.gettempdir(), f"mrefali-{os.getuid()}")):
        folder = os.path.join(own, f"{__version__}-{text}")
        if os.path.isabs(own) and _is_ours(own) and _can_be_written(folder):
            return folder
    return tempfile.mkdtemp(prefix="mrefali-")


def _is_ours(folder):
    """Whether a folder, made if need be, is one that nobody else can put code into for us to run."""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _can_be_written(folder):
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextmanager
def _cache_of_our_own():
    """Where numba looks as it meets a function to be compiled; what others compile is not ours to place."""
    before = numba.config.CACHE_DIR
    if not (before or numba.config.DISABLE_JIT):
        numba.config.CACHE_DIR = _folder()
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


with _cache_of_our_own():
    from mrefali import kernels

__all__ = ["kernels"]
