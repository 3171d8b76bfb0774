"""A run opened in Python: its tables and arrays are those of the files, its figures show what they say."""

import inspect
import io
import json
import re

import finished
import numpy as np
import pandas
import pytest
import small
from matplotlib.figure import Figure
from PIL import Image

import mrefali
from mrefali import average, commands, findings, geometry, reference, results
from mrefali.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The small job, three iterations."""
    folder = tmp_path_factory.mktemp("results")
    stack, refs = small.write(folder)
    mrefali.mref_ali2d(stack, refs, str(folder / "out"), maxit=3, **small.OPTIONS)
    return mrefali.open_run(folder / "out")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Thirty classes, of which 3 and 4 vanished."""
    return mrefali.open_run(finished.write(tmp_path_factory.mktemp("made"), n_classes=30, n_particles=400,
                                           vanished=(3, 4)))


def size(picture):
    return Image.open(io.BytesIO(picture._repr_png_())).size


def test_averages_frc_and_counts_are_those_of_the_last_files(run):
    np.testing.assert_array_equal(run.averages, mrefali.open_stack(f"{run.path}/multi_ref.hdf").read(0, 2))
    assert run.frc.shape == (2, 11, 3)
    np.testing.assert_array_equal(run.frc[1], np.loadtxt(f"{run.path}/drm0020001.txt"))
    np.testing.assert_array_equal(run.counts[-1], mrefali.open_stack(f"{run.path}/multi_ref.hdf").column("ave_n"))
    assert run.counts.shape == run.changed.shape == run.resolution_05_px.shape == (3, 2)
    assert (run.n_particles, run.n_references, run.n_iterations, run.box, run.pixel_size_A) == (24, 2, 3, 20, 2.5)


def test_poses_and_history_are_data_frames_of_the_tables(run):
    poses, history = run.poses, run.history
    assert isinstance(poses, pandas.DataFrame)
    assert poses.index.name == "index"
    assert poses.index.tolist() == list(range(24))
    written = small.read_table(f"{run.path}/poses.csv")
    assert {name: poses[name].tolist() for name in poses} == {k: v for k, v in written.items() if k != "index"}
    assert poses["assign"].dtype == poses["mirror"].dtype == np.int64
    assert history.groupby("iteration")["count"].sum().tolist() == [24, 24, 24]
    assert history["resolution_0.5_px"].tolist() == small.read_table(f"{run.path}/history.csv")["resolution_0.5_px"]


def test_the_mean_peak_of_a_class_is_that_of_its_particles(run):
    poses = run.poses
    np.testing.assert_allclose(run.mean_peak[-1], poses.groupby("assign")["peak"].mean(), rtol=1e-12)
    assert run.history["mean_peak"].tolist() == run.mean_peak.ravel().tolist()


def test_a_history_of_a_version_without_class_health_is_read(tmp_path):
    outdir = finished.write(tmp_path)
    history = pandas.read_csv(f"{outdir}/history.csv")
    history.drop(columns=list(results.HEALTH_COLUMNS)).to_csv(f"{outdir}/history.csv", index=False)
    run = mrefali.open_run(outdir)
    assert np.isnan([run.mean_peak, run.like, run.likeness, run.detail, run.detail_error]).all()
    assert run.counts.sum(axis=1).tolist() == [60, 60]
    assert titles(outdir) == []
    mrefali.report(outdir)


def test_a_class_that_vanished_has_no_frc_and_no_resolution(made):
    assert np.flatnonzero(made.vanished).tolist() == [3, 4]
    assert np.isnan(made.like[-1, 3:5]).all()
    assert not np.isnan(made.mean_peak[-1, 3:5]).any()  # of two particles each
    assert np.isnan(made.frc[3:5]).all()
    assert not np.isnan(np.delete(made.frc, [3, 4], axis=0)).any()
    assert made.by_size[-2:].tolist() == [3, 4]
    assert (np.diff(made.counts[-1][made.by_size]) <= 0).all()


def test_moved_members_look_like_their_average_and_raw_ones_do_not(run):
    """Truth: moved by its pose, the filtered mean of the members is the average, but for their normalisation."""
    members = run.choose_members(0, 100)
    raw, moved = run.read_members(run.stack(), members)
    last = run.history.query("iteration == 2").iloc[0]
    inside = geometry.disc(run.box, small.OPTIONS["ou"])

    def alike(images):
        mean = images.mean(axis=0, dtype=float)
        mean = reference.low_pass((mean - mean[inside].mean()) * inside,
                                  reference.TanhFilter(last["filter_cutoff"], last["filter_falloff"]))
        return np.corrcoef(mean[inside], run.averages[0][inside])[0, 1]

    assert alike(moved) > 0.98
    assert alike(raw) < 0.8
    assert len(members) == run.counts[-1, 0]


def test_the_centre_of_a_particle_is_where_its_pose_says(tmp_path):
    """A bright pixel at (x, y) = (+3, -2) of the centre, which the pose carries onto the centre of the average."""
    outdir = finished.write(tmp_path, n_classes=1, n_particles=8)
    run = mrefali.open_run(outdir)
    before, after = run.centers
    np.testing.assert_array_equal(before, 0)
    poses = results._poses(run.pose_columns)
    for k, (x, y) in enumerate(after):
        image = np.zeros((1, 32, 32), np.float32)
        i, j = round(x), round(y)
        image[0, 16 + j, 16 + i] = 1
        moved = average.transform(image, poses[k:k + 1])[0]
        peak = np.array(np.unravel_index(moved.argmax(), moved.shape)) - 16
        assert np.abs(peak).max() <= 1


def test_no_particle_is_found_beyond_the_edge_of_the_search_however_its_class_was_centred(tmp_path):
    stack, refs = small.write(tmp_path)
    assert mrefali.header(stack, "xform.align2d", zero=True) is None
    mrefali.mref_ali2d(stack, refs, str(tmp_path / "out"), maxit=1, **small.OPTIONS | {"ou": 8})  # to 1 px each way
    run = mrefali.open_run(tmp_path / "out")
    shifts = run.history[["center_x", "center_y"]].to_numpy()
    assert np.abs(shifts).max() > 0.05  # something to undo
    before, found = run.centers
    np.testing.assert_array_equal(before, 0)
    assert np.abs(found).max() <= 1 + 1e-5
    assert (np.abs(np.abs(found) - 1) < 1e-5).any()


# ---- a run at work, or spoiled


def test_of_a_run_at_work_the_whole_iterations_are_read(tmp_path):
    outdir = finished.write(tmp_path, n_iterations=2, finished=False)
    with open(f"{outdir}/history.csv", "a") as file:
        file.write("2,0,10,1,5.0,4.0,0.2,0.2,0,0,1.5\n2,1,10,1,5.")
    run = mrefali.open_run(outdir)
    assert run.n_iterations == 2
    assert run.state == "unfinished"
    assert run.history.shape == (12, 16)


def test_the_state_of_a_run_is_in_its_files(tmp_path):
    outdir = finished.write(tmp_path)
    assert mrefali.open_run(outdir).state == "finished"
    with open(f"{outdir}/mrefali.log", "a") as file:
        file.write("2026-01-02 03:04:05,678 ERROR   the run ended by RunFailed: no space\n")
    run = mrefali.open_run(outdir)
    assert run.state == "failed"
    assert [part for part in run.log[-1][1:]] == ["ERROR", "the run ended by RunFailed: no space"]
    assert run.log[-1][0].isoformat() == "2026-01-02T03:04:05.678000"


@pytest.mark.parametrize(("name", "text", "message"), [
    ("history.csv", "a,b\n" + "1,2\n" * 6, "history.csv is no history of a run: KeyError"),
    ("poses.csv", "index,assign\n0,1\n", "poses.csv has 1 rows, but 60 particles were aligned"),
    ("poses.csv", "index,assign\n0,one\n", "poses.csv is no table of numbers"),
])
def test_a_spoiled_table_is_named(tmp_path, name, text, message):
    outdir = finished.write(tmp_path)
    (tmp_path / "out" / name).write_text(text)
    with pytest.raises(InputError, match=message):
        mrefali.open_run(outdir).poses.empty  # noqa: B018


def test_what_is_not_there_is_refused_in_one_line(run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="class 2 is not there: give 0 to 1"):
        run.members(2)
    with pytest.raises(InputError, match="class 7 is not there: give 0 to 1"):
        run.plot_frc([0, 7])
    with pytest.raises(InputError, match="order=count is not known: give size or number"):
        run.montage("count")
    monkeypatch.setattr(results, "VIZ", ("pandas_not_here",))
    with pytest.raises(InputError, match=r"poses needs pandas_not_here: pip install 'mrefali\[viz\]'"):
        run.poses.empty  # noqa: B018


# ---- figures


def test_every_figure_is_one_of_matplotlib_that_jupyter_shows_without_pyplot(run):
    for picture in (run.montage(), run.plot_frc(), run.plot_convergence(), run.plot_shifts(), run.members(0)):
        assert isinstance(picture, Figure)
        width, height = size(picture)
        assert 150 < width < 1400
        assert 100 < height < 700


def test_the_figures_draw_the_numbers_of_the_run(made):
    lines = made.plot_frc([0, 5]).axes[0].lines
    np.testing.assert_array_equal(lines[1].get_ydata(), made.frc[5, :, 1])
    criterion, changed, counts, _ = made.plot_convergence().axes
    np.testing.assert_array_equal(criterion.lines[0].get_ydata(), made.criterion)
    assert len(changed.lines[0].get_ydata()) == 1  # nothing changes in the first iteration
    assert len(counts.lines) == 31  # the classes and their median
    x, y, angle = made.plot_shifts().axes
    assert [sum(bar.get_height() for bar in axes.patches) for axes in (x, y, angle)] == [400, 400, 400]
    assert {line.get_xdata()[0] for line in x.lines} == {-2, 2, -3, 3}


def test_a_montage_has_a_caption_each_in_its_order_and_no_picture_for_a_class_that_vanished(made):
    axes, = made.montage("number").axes
    captions = [text.get_text() for text in axes.texts if text.get_text() != "vanished"]
    assert [caption.split(":")[0] for caption in captions] == [str(k) for k in range(30)]
    assert captions[5] == (f"5: {made.counts[-1, 5]} ({made.counts[-1, 5] / 400:.1%})\n"
                           f"{made.in_words(made.resolution_05_px[-1, 5])} / "
                           f"{made.in_words(made.resolution_0143_px[-1, 5])}")
    assert len(axes.images) == 28
    axes, = made.montage().axes
    assert int(axes.texts[0].get_text().split(":")[0]) == made.by_size[0]


def test_a_run_shows_itself_with_its_name_escaped(tmp_path):
    (tmp_path / "<b>").mkdir()
    run = mrefali.open_run(finished.write(tmp_path / "<b>"))
    assert "&lt;b&gt;/out</b>: 60 particles, 6 classes; finished" in run._repr_html_()
    assert "data:image/png;base64," in run._repr_html_()
    assert repr(run).endswith("out: 60 particles, 6 classes, 2 iterations, finished>")


def test_a_stack_shows_itself(tmp_path):
    path = tmp_path / "<i>.hdf"
    mrefali.write_stack(path, np.random.default_rng(0).standard_normal((30, 16, 16)).astype(np.float32),
                        pixel_size_A=1.5)
    stack = mrefali.open_stack(path)
    assert isinstance(stack, mrefali.Stack)
    assert repr(stack) == f"<mrefali.Stack {path}: 30 images of 16 x 16 px, 1.5 A a pixel>"
    page = stack._repr_html_()
    assert "&lt;i&gt;.hdf: 30 images" in page
    assert "data:image/jpeg;base64," in page


def test_without_the_extra_jupyter_gets_the_plain_text(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run._repr_html_() is None
    assert run.stack()._repr_html_() is None


# ---- findings


def titles(outdir):
    return [title for title, _ in findings.findings(mrefali.open_run(outdir))]


def put_shifts(outdir, x):
    """Give the particles of a made run the shifts ``x`` (px, unturned), and their starts to the origin."""
    table = pandas.read_csv(f"{outdir}/poses.csv")
    table["alpha"], table["sx"], table["sy"] = 0.0, -np.asarray(x), 0.0  # the middle lies at -sx
    table.to_csv(f"{outdir}/poses.csv", index=False)


def test_a_good_run_has_no_finding(tmp_path):
    assert titles(finished.write(tmp_path, n_particles=600)) == []


def test_particles_piled_up_at_the_range_are_found_and_a_wide_enough_range_is_not(tmp_path):
    outdir = finished.write(tmp_path, n_particles=1000)  # searches -2 to 2, the image ends at 3
    true = np.random.default_rng(1).normal(0, 2.5, 1000)
    put_shifts(outdir, np.clip(true.round(), -2, 2))
    assert [title.split(" at ")[1] for title in titles(outdir)] == ["x = -2 px", "x = +2 px"]
    put_shifts(outdir, np.clip(np.random.default_rng(1).normal(0, 0.8, 1000).round(), -2, 2))
    assert titles(outdir) == []


def test_particles_piled_up_at_the_edge_of_the_image_are_told_from_a_short_range(tmp_path):
    outdir = finished.write(tmp_path, n_particles=1000, xrng=9.0)
    put_shifts(outdir, np.clip(np.random.default_rng(1).normal(0, 4, 1000).round(), -3, 3))
    (_, text), _ = findings.findings(mrefali.open_run(outdir))
    assert "the disc of radius ou meets the edge of the image: give a smaller --ou" in text


def test_vanished_dominant_unsettled_and_fallen_are_found(tmp_path):
    outdir = finished.write(tmp_path, n_particles=400, vanished=(1, 2))
    history = pandas.read_csv(f"{outdir}/history.csv")
    last = history["iteration"] == 1
    history.loc[last & (history["class"] == 0), "count"] = 300
    history.loc[last & (history["class"] == 5), "changed"] = 90
    history.loc[last, "criterion"] = 0.5
    history.to_csv(f"{outdir}/history.csv", index=False)
    assert [title[:14] for title in titles(outdir)] == [
        "2 of 6 classes", "Class 0 holds ", titles(outdir)[2][:14], "The criterion "]
    assert "of the particles still changed class" in titles(outdir)[2]
    assert findings.findings(mrefali.open_run(outdir))[0][1].startswith("Classes 1, 2 have fewer than four")


def put_parameters(outdir, remove, **others):
    with open(f"{outdir}/parameters.json") as file:
        parameters = json.load(file)
    with open(f"{outdir}/parameters.json", "w") as file:
        json.dump({name: value for name, value in parameters.items() if name not in remove} | others, file)


#: Of each command, options of its runs, and the options that findings name.
OPTIONS = {
    "mref_ali2d": ({"vanished": "random", "assignment": "best", "normalize_references": False},
                   {"normalize_references", "vanished", "assignment", "yr", "maxit"}),
    "classify": ({"K": 20, "xr": 2.0, "yr": 2.0, "ts": 1.0, "maxit": 0, "vanished": "split", "assignment": "likeliest"},
                 {"K", "assignment", "xr"}),
    "ali2d": ({"xr": [2.0], "yr": [2.0], "ts": [1.0], "maxit": 0}, {"yr"}),
    "local_ali2d": ({}, {"maxit"}),
}


@pytest.mark.parametrize("command", OPTIONS)
def test_a_finding_names_options_that_the_command_has_and_has_not_set(tmp_path, command):
    outdir = finished.write(tmp_path, n_particles=1000, vanished=(1, 2))
    options, expected = OPTIONS[command]
    put_parameters(outdir, () if command == "mref_ali2d" else ("xrng", "yrng", "step"), **options)
    put_health(outdir, like={3: 4}, likeness={3: 0.97}, detail={0: 0.42}, count={0: 800}, changed={5: 900},
               criterion=dict.fromkeys(range(6), 0.5))
    table = pandas.read_csv(f"{outdir}/poses.csv")
    table["alpha"], table["mirror"], table["sx"] = 0.0, 0, 0.0
    table["sy"] = np.clip(np.random.default_rng(1).normal(0, 2.5, 1000).round(), -2, 2)
    table.to_csv(f"{outdir}/poses.csv", index=False)
    found = findings.findings(mrefali.open_run(outdir))
    text = " ".join(said for _, said in found)
    named = set(re.findall("--([A-Za-z_0-9]+)", text)) - {"classes"}  # that of select
    assert named <= inspect.signature(getattr(commands, command)).parameters.keys()
    assert named == expected
    assert ("unequal contrast" in text) == (command == "mref_ali2d")
    assert ("6 classes were found, K=20 asked for" in [title for title, _ in found]) == (command == "classify")


def put_health(outdir, **columns):
    """Give the classes of the last iteration of a made run other values, a dict of class and value a column."""
    history = pandas.read_csv(f"{outdir}/history.csv")
    last = history["iteration"] == 1
    for name, values in columns.items():
        for k, value in values.items():
            history.loc[last & (history["class"] == k), name] = value
    history.to_csv(f"{outdir}/history.csv", index=False)


def test_classes_of_one_view_and_junk_are_found_with_the_way_out(tmp_path):
    outdir = finished.write(tmp_path, n_particles=600)
    put_health(outdir, like={1: 4, 2: 5, 5: 3}, likeness={1: 0.97, 2: 0.91, 5: 0.93, 3: 0.89}, detail={0: 0.42})
    (view, merge), (junk, leave) = findings.findings(mrefali.open_run(outdir))
    assert view == "Classes show the same view: 1 and 4; 2, 3 and 5"
    assert merge.endswith(f"mrefali select {outdir} one.star --classes=1,4.")
    assert junk == "Class 0 looks like junk, or like several views in one"
    assert "(42%)" in leave
    assert leave.endswith(f"mrefali select {outdir} good.star --classes=1,2,3,4,5.")
    mrefali.select(outdir, str(tmp_path / "one.hdf"), classes=[1, 4])
    assert mrefali.open_stack(tmp_path / "one.hdf").n_images == mrefali.open_run(outdir).counts[-1, [1, 4]].sum()


def test_many_groups_and_many_classes_to_keep_are_cut_short(tmp_path):
    outdir = finished.write(tmp_path, n_classes=60, n_particles=3000)
    put_health(outdir, like={k: k + 1 for k in range(0, 58, 2)}, likeness={k: 0.95 for k in range(0, 58, 2)},
               detail={59: 0.3})
    (view, _), (_, leave) = findings.findings(mrefali.open_run(outdir))
    assert view.endswith("; 22 and 23; and 17 groups more")
    assert leave.endswith("--classes=" + ",".join(map(str, range(24))) + ",....")
