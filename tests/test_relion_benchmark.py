"""The comparison with RELION, but for RELION: what is read from its files and how it is counted."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from mrefali.geometry import identity_poses
from mrefali.simulation import write_truth


@pytest.fixture
def relion(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("relion")


def write_run(folder, classes, assign):
    """The truth, and RELION's last file with the particles from the last to the first."""
    write_truth(folder / "p_truth.csv", np.array(classes), identity_poses(len(classes)))
    (folder / "relion").mkdir()
    rows = [f"{i + 1:06d}@p.mrcs {k + 1}" for i, k in enumerate(assign)]
    (folder / "relion/run_it025_data.star").write_text(
        "data_optics\n\nloop_\n_rlnOpticsGroup #1\n1\n\ndata_particles\n\nloop_\n_rlnImageName #1\n_rlnClassNumber #2\n"
        + "\n".join(rows[::-1]) + "\n")


def test_classes_are_counted_from_0_in_the_order_of_the_stack(relion, tmp_path):
    write_run(tmp_path, [0, 0, 1], [15, 2, 0])
    assert relion.classes_of_relion(tmp_path) == [15, 2, 0]


def test_a_class_has_the_view_that_most_of_it_show_and_a_view_may_have_none(relion, tmp_path):
    # class 3 is of view 0, class 9 too, class 5 of view 2; the one particle of view 1 is in another's class
    write_run(tmp_path, [0, 0, 0, 0, 2, 2, 1], [3, 3, 9, 5, 5, 5, 3])
    share, views, classes = relion.score("relion", tmp_path)
    assert classes == 3
    assert share == pytest.approx(5 / 7)
    assert views == 2
