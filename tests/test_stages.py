"""Coarse to fine, ``subpixel`` and ``local_ali2d`` as a user meets them: on arrays, on files and on two ranks."""

import golden
import numpy as np
import pytest
import small
from test_mpi import launch_python, same_files
from test_mpi import write as write_job

import mrefali
from mrefali import cli
from mrefali.accuracy import compare
from mrefali.errors import InputError
from mrefali.geometry import compose, from_matrices, make_poses, to_matrices
from mrefali.io import open_stack, write_stack
from mrefali.reference import DEAD_BAND_PX, find_center, fourier_shift
from mrefali.simulation import simulate_particles


def run(**options):
    return mrefali.align(small.particles(), small.references(), small.poses(), ou=6, center=0, quiet=True, **options)


# --- stages


def test_stages_go_on_from_each_others_averages_and_poses():
    together = run(xr=[2, 1], yr=[2, 1], ts=[1, 0.5], maxit=2)
    first = run(xr=2, yr=2, ts=1, maxit=2)
    second = mrefali.align(small.particles(), first.averages, first.poses, ou=6, center=0, quiet=True, xr=1, yr=1,
                           ts=0.5, maxit=2)
    assert [i.number for i in together.iterations] == [0, 1, 2, 3]
    assert together.poses.tobytes() == second.poses.tobytes()
    assert together.averages.tobytes() == second.averages.tobytes()


def test_a_single_number_serves_every_stage():
    assert run(xr=1, yr=1, ts=(1, 0.5), maxit=1).poses.tobytes() == run(xr=[1, 1], yr=(1, 1), ts=[1, 0.5],
                                                                      maxit=1).poses.tobytes()


@pytest.mark.parametrize(("options", "message"), [
    ({"xr": [4, 2, 1], "ts": [2, 1]}, r"ts=2 1 has 2 stages, but xr, yr and ts together 3: give 3 numbers, or one"),
    ({"xr": [1, "2"]}, "xr='2' is not allowed: give a finite number"),
    ({"xr": [1, np.inf]}, "xr=inf is not allowed: give a finite number"),
    ({"xr": []}, r"xr=\[\] is not allowed"),
    ({"xr": [1, -1]}, "xr=-1.0 is not allowed: give the half-range"),
    ({"lowpass": 0.6}, "lowpass=0.6 is not allowed: give a frequency in 1/px above 0 to 0.5"),
    ({"highpass": 0}, "highpass=0 is not allowed"),
    ({"lowpass": 0.1, "highpass": 0.1}, "highpass=0.1 is not below lowpass=0.1"),
])
def test_what_makes_no_stages_or_band_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        run(**options)


# --- the option subpixel


def test_a_run_with_subpixel_keeps_classes_and_moves_poses_between_the_steps():
    plain, refined = run(xr=1, yr=1, maxit=1), run(xr=1, yr=1, maxit=1, subpixel=True)
    np.testing.assert_array_equal(refined.assign, plain.assign)
    np.testing.assert_array_equal(refined.poses["mirror"], plain.poses["mirror"])
    moved = np.hypot(refined.poses["sx"] - plain.poses["sx"], refined.poses["sy"] - plain.poses["sy"])
    assert (moved > 0.01).mean() > 0.5


# --- centring that settles


@pytest.mark.parametrize("sign", [1, -1])
def test_the_centre_of_the_power_moves_with_the_image_and_a_dead_band_holds_it(sign):
    view = sign * simulate_particles(1, 1, 48, snr=np.inf, seed=2).views[0].astype(float)
    mask = np.hypot(*(np.indices((48, 48)) - 24)) <= 20
    centred = fourier_shift(view, -find_center(fourier_shift(view, (3.0, 3.0)), mask, 4) + 3.0)
    far = np.array([2.5, -1.5])
    np.testing.assert_allclose(find_center(fourier_shift(centred, far), mask, 4), far, atol=0.05)
    near = np.array([0.3, -0.3])
    assert np.hypot(*near) < DEAD_BAND_PX
    assert find_center(fourier_shift(centred, near), mask, 4).tolist() == [0, 0]


@pytest.mark.jit_only
@pytest.mark.parametrize("snr", [0.1, 0.3])
def test_centring_by_power_settles_where_the_phase_centre_goes_on(snr):
    made = simulate_particles(200, 2, 64, snr=snr, seed=5)
    references = np.stack([fourier_shift(view.astype(float), (2.5, -1.5)) for view in made.views]).astype(np.float32)

    def moves(center):
        found = mrefali.align(made.images, references, ou=25, xr=3, yr=3, center=center, maxit=4, quiet=True)
        return np.array([[np.hypot(*c.shift) for c in iteration.classes] for iteration in found.iterations])

    settling, overshooting = moves(4), moves(1)
    assert (settling[0] > 1).all()
    assert (settling[2:] == 0).all()
    assert (overshooting[0] > 1.3 * settling[0]).all()
    assert (overshooting[1:] > DEAD_BAND_PX).all()


@pytest.mark.jit_only
def test_on_the_golden_particles_the_phase_centre_goes_to_and_fro_and_the_centre_of_the_power_stays():
    case = golden.load("typical")
    poses = from_matrices(np.array([np.reshape(header["xform.align2d"], (3, 4)) for header in case.headers]))

    def shifts(center):
        found = mrefali.align(case.images, case.references, poses, ou=case.call["ou"], xr=case.call["xrng"],
                              yr=case.call["yrng"], center=center, maxit=4, quiet=True)
        return np.array([[-c.shift for c in iteration.classes] for iteration in found.iterations])

    overshooting, settling = shifts(1), shifts(4)
    # x of class 0, as the original has it: the shift is folded into poses and average, and found again the other way
    np.testing.assert_allclose(overshooting[:3, 0, 0], [0.79, -0.71, 0.45], atol=0.01)
    assert (overshooting[1:, :, 0] * overshooting[:-1, :, 0] < 0).all()
    assert (np.hypot(*np.moveaxis(settling[0], -1, 0)) > DEAD_BAND_PX).all()
    assert (settling[1:] == 0).all()


# --- local_ali2d


@pytest.fixture
def displaced(tmp_path):
    """A stack whose poses are up to 1 px and 3 degrees from the truth, its views, and the truth."""
    made = simulate_particles(80, 2, 48, snr=1.0, max_shift=2.0, seed=8)
    rng = np.random.default_rng(0)
    poses = compose(made.poses, make_poses(rng.uniform(-3, 3, 80), *rng.uniform(-1, 1, (2, 80))))
    stack, refs = str(tmp_path / "stack.hdf"), str(tmp_path / "refs.hdf")
    write_stack(stack, made.images, [{"xform.align2d": m, "assign": int(k)}
                                     for m, k in zip(to_matrices(poses), made.classes, strict=True)])
    write_stack(refs, made.views)
    return stack, refs, poses, made


@pytest.mark.jit_only
def test_local_ali2d_brings_poses_close_to_the_truth(displaced, tmp_path):
    stack, refs, poses, made = displaced
    assert cli.main(["local_ali2d", stack, refs, str(tmp_path / "out"), "--ou=20", "--maxit=3"]) == 0
    found = open_stack(stack)
    assert found.column("assign") == made.classes.tolist()
    before = compare(made.classes, poses, made.classes, made.poses, 2, 2)
    after = compare(found.column("assign"), found.poses(), made.classes, made.poses, 2, 2)
    assert before.shift_error_rms > 0.7
    assert after.shift_error_rms < 0.12  # twice the bound of 0.04 px an axis
    assert after.angle_error_rms < before.angle_error_rms / 2
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"aqm002.hdf", "drm0020001.txt", "multi_ref.hdf", "poses.csv", "history.csv", "mrefali.log"} <= names
    assert small.read_table(tmp_path / "out/poses.csv")["changed"] == [0.0] * 80


def test_one_reference_is_that_of_all_particles(tmp_path):
    stack, refs = small.write(tmp_path)
    write_stack(str(tmp_path / "one.hdf"), small.references()[:1])
    mrefali.local_ali2d(stack, str(tmp_path / "one.hdf"), str(tmp_path / "out"), ou=6, maxit=1, quiet=True)
    assert open_stack(stack).column("assign") == [0] * small.N_PARTICLES
    assert open_stack(str(tmp_path / "out/aqm000.hdf")).column("ave_n") == [small.N_PARTICLES]


@pytest.mark.parametrize(("assign", "pose", "message"), [
    (None, (0, 0, 0), "an image has no header assign, its class among the 2 references"),
    (2, (0, 0, 0), "image 0 has assign=2, but .* holds 2 references, 0 to 1"),
    (-1, (0, 0, 0), "image 0 has assign=-1"),
    (1, (0, 0, 40), r"image 0 has a pose \(sx 0, sy 40\) that puts its centre outside the image"),
])
def test_local_ali2d_refuses_what_it_cannot_refine(tmp_path, assign, pose, message):
    stack, refs, out = str(tmp_path / "stack.hdf"), str(tmp_path / "refs.hdf"), tmp_path / "out"
    write_stack(refs, small.references())
    header = {"xform.align2d": to_matrices(make_poses(*pose))} | ({} if assign is None else {"assign": assign})
    write_stack(stack, small.particles(), [header] * small.N_PARTICLES)
    with pytest.raises(InputError, match=message):
        mrefali.local_ali2d(stack, refs, str(out), ou=6, quiet=True)
    assert not out.exists()


@pytest.mark.parametrize("words", [["mref_ali2d", "--xr=1 0", "--ts=1", "--subpixel", "--lowpass=0.2"],
                                   ["local_ali2d", "--highpass=0.02"]], ids=["subpixel", "local"])
def test_two_ranks_write_what_one_does(tmp_path, words):
    command, *options = words
    places = []
    for name in ("one", "two"):
        places.append(tmp_path / name)
        stack, refs, out = write_job(places[-1])
        open_stack(stack).write_columns({"assign": np.arange(small.N_PARTICLES) % 2})
        call = [command, stack, refs, out, "--ou=6", "--maxit=2", *options]
        if name == "one":
            assert cli.main(call) == 0
        else:
            done = launch_python("-m", "mrefali", *call, "--MPI", ranks=2)
            assert done.returncode == 0, done.stderr
    same_files(*places)
