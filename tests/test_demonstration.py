"""The demo: what it finds, what it prints and leaves behind, and what it refuses."""

import re

import numpy as np
import pytest

from mrefali import demo, geometry
from mrefali.demonstration import ITERATIONS, OUTER_RADIUS, SIZES, poor_references
from mrefali.errors import InputError
from mrefali.io import open_stack
from mrefali.simulation import simulate_particles

pytestmark = pytest.mark.jit_only


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory and the comparison of one demo."""
    outdir = tmp_path_factory.mktemp("demo") / "out"
    return outdir, demo(outdir)


def test_nearly_every_particle_is_found(finished):
    _, found = finished
    assert found.class_share > 0.98
    assert found.mirror_share > 0.98
    # the grid alone, of 1 px, gives a median length of 0.4 px
    assert found.shift_error_median < 0.6
    assert found.angle_error_median < 1.5


def test_every_file_is_there_and_whole(finished):
    outdir, _ = finished
    assert sorted(path.name for path in outdir.iterdir()) == [
        "particles.hdf", "particles_truth.csv", "particles_views.hdf", "references.hdf", "run"]
    for name in ("particles_views.hdf", "references.hdf", "run/multi_ref.hdf", f"run/aqm{ITERATIONS - 1:03d}.hdf"):
        assert open_stack(outdir / name).n_images == len(SIZES)
    assert open_stack(outdir / "particles.hdf").n_images == sum(SIZES)


def test_classes_have_the_sizes_of_the_views(finished):
    outdir, _ = finished
    counts = open_stack(outdir / "run/multi_ref.hdf").column("ave_n")
    np.testing.assert_allclose(sorted(counts), sorted(SIZES), atol=0.02 * sum(SIZES))


def test_it_says_what_was_found_and_where(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = demo()
    said = capsys.readouterr().out
    assert f"{100 * found.class_share:.1f} % of the particles are in the right class" in said
    named = re.findall(r"mrefali_demo/[\w./]+\w", said)
    assert len(set(named)) == 8
    assert all((tmp_path / name).exists() for name in named)


def test_the_references_are_not_the_answer():
    particles = simulate_particles(120, 3, 64, snr=0.2, seed=4)
    references = poor_references(particles.images, particles.classes, particles.poses)
    inside = geometry.disc(64, OUTER_RADIUS)
    for reference, view in zip(references, particles.views, strict=True):
        assert np.corrcoef(reference[inside], view[inside])[0, 1] < 0.95
    np.testing.assert_allclose(references[:, inside].std(axis=1), 1.0, rtol=1e-4)


def test_an_existing_directory_is_refused(tmp_path):
    with pytest.raises(FileExistsError, match="exists already: give a new name"):
        demo(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parent_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot be made: there is no folder .*, make it first"):
        demo(tmp_path / "nowhere" / "out")
    assert list(tmp_path.iterdir()) == []


def test_threads_are_checked_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match="threads=-1 is not allowed"):
        demo(tmp_path / "out", threads=-1)
    assert list(tmp_path.iterdir()) == []
