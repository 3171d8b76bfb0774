"""The command that holds an aligned stack against the truth: right answers for known ones, and what it refuses."""

import json
import shutil

import numpy as np
import pytest

from mrefali import cli, evaluate
from mrefali.errors import InputError
from mrefali.geometry import compose, make_poses, to_matrices
from mrefali.io import open_stack
from mrefali.limits import cramer_rao, information
from mrefali.simulation import read_truth, simulate

N, VIEWS, BOX, SNR = 60, 3, 32, 0.5


def set_headers(path, assign, poses):
    open_stack(path).write_columns({"xform.align2d": to_matrices(poses), "assign": assign})


@pytest.fixture(params=[False, True], ids=["plain", "ctf"])
def solved(tmp_path, request):
    """A stack that has the truth in its headers, its truth file, and whether there is a CTF."""
    stack, truth = tmp_path / "a.hdf", tmp_path / "a_truth.csv"
    simulate(stack, N, VIEWS, BOX, SNR, seed=2, junk=0.1, CTF=request.param, max_shift=2.0)
    classes, poses = read_truth(truth)
    set_headers(stack, np.maximum(classes, 0), poses)
    return stack, truth, request.param


def test_the_truth_itself_is_right(solved):
    stack, truth, with_ctf = solved
    found = evaluate(stack, truth, CTF=with_ctf)
    assert found.n_junk == 6
    assert (found.comparison.class_share, found.comparison.adjusted_rand, found.comparison.gross_share) == (1, 1, 0)
    assert found.comparison.angle_error_rms < 1e-3  # headers are float32
    # coarse detail is beyond doubt, and the averages of others are not this view
    assert (found.frc[:, 1:4] > 0.8).all()


def test_the_bound_is_that_of_the_noise(solved):
    stack, truth, with_ctf = solved
    if with_ctf:
        with_bound, without = (evaluate(stack, truth, CTF=flag) for flag in (True, False))
        assert with_bound.shift_bound > without.shift_bound  # a CTF takes signal away
        return
    views, (classes, _) = open_stack(truth.with_name("a_views.hdf")).read(0, VIEWS), read_truth(truth)
    inside = np.hypot(*np.indices((BOX, BOX)) - BOX // 2) <= BOX // 2 - 2
    bounds = np.array([cramer_rao(information(view), view[inside].var() / SNR) for view in views])
    mean = bounds[classes[classes >= 0]].mean(axis=0)
    # the noise of a particle is measured on 300 pixels, to 8 %, which is 1.2 % of the mean of 54; a mirrored or moved
    # view has its pixels elsewhere
    found = evaluate(stack, truth)
    assert found.angle_bound == pytest.approx(np.sqrt(mean[2, 2]), rel=0.04)
    assert found.shift_bound == pytest.approx(np.sqrt(mean[0, 0] + mean[1, 1]), rel=0.04)


def test_errors_are_multiples_of_the_bound(solved):
    stack, truth, with_ctf = solved
    classes, poses = read_truth(truth)
    sign = np.where(np.arange(N) % 2, 1.0, -1.0)
    set_headers(stack, np.maximum(classes, 0), compose(poses, make_poses(2.0 * sign, 0.5 * sign)))
    found = evaluate(stack, truth, CTF=with_ctf).as_dict()
    assert found["shift_multiple_of_bound"] == pytest.approx(found["shift_error_rms"] / found["shift_bound"])
    assert found["angle_multiple_of_bound"] == pytest.approx(found["angle_error_rms"] / found["angle_bound"])


def test_frc_is_with_the_view_wherever_the_average_stands(solved):
    stack, truth, with_ctf = solved
    before = evaluate(stack, truth, CTF=with_ctf)
    classes, poses = read_truth(truth)
    set_headers(stack, np.array([1, 2, 0, 0])[classes], compose(poses, make_poses(90.0, 1.0, 0.0, 1)))
    after = evaluate(stack, truth, CTF=with_ctf)
    np.testing.assert_array_equal(after.comparison.view_of_class, [2, 0, 1])
    np.testing.assert_allclose(after.frc[[1, 2]][:, 1:4], before.frc[[0, 1]][:, 1:4], atol=0.1)


def test_an_empty_class_is_counted_and_has_no_average(solved, capsys):
    stack, truth, _ = solved
    assert cli.main(["evaluate", str(stack), str(truth), "--classes=5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["empty_classes"] == 2
    assert [c["particles"] for c in found["classes"]][3:] == [0, 0]
    assert found["classes"][4]["resolution_px"] is None


def test_it_prints_what_it_found(solved, capsys):
    stack, truth, _ = solved
    assert cli.main(["evaluate", str(stack), str(truth)]) == 0
    said = capsys.readouterr().out
    assert "60 particles, 6 of them junk" in said
    assert "right class        100.0% (matching one-to-one), adjusted Rand index 1.000" in said
    assert len(said.splitlines()) == 8 + VIEWS


def test_what_does_not_fit_is_refused(tmp_path):
    simulate(tmp_path / "a.hdf", 8, 2, 16, max_shift=1.0)
    simulate(tmp_path / "b.hdf", 10, 2, 16, max_shift=1.0)
    stack, truth = tmp_path / "a.hdf", tmp_path / "a_truth.csv"
    with pytest.raises(InputError, match="not every image has the header assign: align the stack first"):
        evaluate(stack, truth)
    with pytest.raises(InputError, match="b_truth.csv: 10 particles, but .*a.hdf has 8"):
        evaluate(stack, tmp_path / "b_truth.csv")
    set_headers(stack, np.array([0, 1, 2, 0, 0, 0, 0, 0]), make_poses(np.zeros(8)))
    with pytest.raises(InputError, match="classes=2 is not allowed: .* has assign=2, so give at least 3"):
        evaluate(stack, truth, classes=2)
    shutil.copy(truth, tmp_path / "other.csv")
    with pytest.raises(InputError, match="give OUT_truth.csv as"):
        evaluate(stack, tmp_path / "other.csv")
    (tmp_path / "a_views.hdf").unlink()
    with pytest.raises(FileNotFoundError, match="a_views.hdf"):
        evaluate(stack, truth)
