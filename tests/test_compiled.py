"""Where compiled code is kept: where this user may write, and not where that of another version is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mrefali
from mrefali import compiled

PACKAGE = Path(mrefali.__file__).parent

#: Compiles one small kernel and says where its code is and whether it was there.
DESCRIBE = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import mrefali
from mrefali.average import pixel_statistics
from mrefali.compiled import kernels
assert mrefali.__file__.startswith(sys.argv[1]), mrefali.__file__
assert pixel_statistics(np.eye(4, dtype="f4")[None], np.ones((4, 4), bool)).mean[0] == 0.25
print(kernels.describe.stats.cache_path)
print(sum(kernels.describe.stats.cache_hits.values()))
"""


@pytest.fixture
def installed(tmp_path):
    """An installation that nobody can write to, not even root: where a folder of code would be made there is a file."""
    shutil.copytree(PACKAGE, tmp_path / "lib/mrefali", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (tmp_path / "lib/mrefali", tmp_path / "lib/mrefali/io"):
        (folder / "__pycache__").write_text("no folder can be made here")
    return tmp_path / "lib"


def describe(installed, **environment):
    kept = {name: value for name, value in os.environ.items()
            if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "TMPDIR")}
    done = subprocess.run([sys.executable, "-c", DESCRIBE, str(installed)], capture_output=True, text=True, timeout=300,
                          env=kept | {name: str(value) for name, value in environment.items()})
    assert (done.returncode, done.stderr) == (0, "")
    folder, hits = done.stdout.split()
    return Path(folder), int(hits)


@pytest.mark.jit_only
def test_a_read_only_installation_without_a_home_runs_and_compiles_once(installed, tmp_path):
    nobodys, temporary = tmp_path / "nobodys", tmp_path / "tmp"
    nobodys.write_text("a home in which nothing can be made")
    temporary.mkdir()
    folder, hits = describe(installed, HOME=nobodys / "home", TMPDIR=temporary)
    own = temporary / f"mrefali-{os.getuid()}"
    assert own in folder.parents
    assert own.stat().st_mode & 0o777 == 0o700
    assert hits == 0
    assert describe(installed, HOME=nobodys / "home", TMPDIR=temporary) == (folder, 1)


@pytest.mark.jit_only
def test_the_users_cache_comes_first_and_a_changed_kernel_has_another_folder(installed, tmp_path):
    folder, _ = describe(installed, HOME=tmp_path)
    assert tmp_path / ".cache/mrefali" in folder.parents
    kernels = installed / "mrefali/kernels.py"
    times = kernels.stat()
    kernels.write_text(kernels.read_text() + "\n")
    os.utime(kernels, ns=(times.st_atime_ns, times.st_mtime_ns))
    other, hits = describe(installed, HOME=tmp_path)
    assert other.parent != folder.parent
    assert hits == 0


@pytest.mark.jit_only
def test_numbas_own_variable_stands(installed, tmp_path):
    folder, _ = describe(installed, HOME=tmp_path, NUMBA_CACHE_DIR=tmp_path / "chosen")
    assert tmp_path / "chosen" in folder.parents
    assert not (tmp_path / ".cache").exists()


@pytest.fixture
def places(monkeypatch, tmp_path):
    """The user's cache and the folder of temporary files."""
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(temporary))
    return cache, temporary / f"mrefali-{os.getuid()}"


def test_a_folder_that_others_may_write_to_is_not_used(places):
    cache, temporary = places
    (cache / "mrefali").mkdir(parents=True)
    (cache / "mrefali").chmod(0o777)
    assert temporary in Path(compiled._folder()).parents
    temporary.chmod(0o770)
    last = Path(compiled._folder())
    assert temporary not in last.parents
    assert last.stat().st_mode & 0o777 == 0o700


def test_a_link_to_a_folder_is_not_followed(places, tmp_path):
    cache, temporary = places
    cache.write_text("no cache")
    (tmp_path / "others").mkdir()
    temporary.symlink_to(tmp_path / "others")
    assert temporary not in Path(compiled._folder()).parents


def test_what_others_compile_is_not_placed():
    import numba

    before = numba.config.CACHE_DIR
    with compiled._cache_of_our_own():
        pass
    assert numba.config.CACHE_DIR == before
