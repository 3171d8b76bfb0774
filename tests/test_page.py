"""The page of a run: its size, what it says, what it escapes, and what becomes of a run whose page fails."""

import base64
import io
import json
import logging
import re
import subprocess
import sys

import finished
import numpy as np
import pytest
import small
from PIL import Image

import mrefali
from mrefali import cli, findings, page, results
from mrefali.errors import InputError, RunFailed

HOSTILE = '</script><script>document.title="taken"</script><img src=x onerror=alert(1)>&quot;"\''


def read(outdir):
    with open(f"{outdir}/report.html", encoding="utf-8") as file:
        return file.read()


def data(text):
    """The numbers that the script of the page draws."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])


def picture(uri):
    """A picture of the page as an array."""
    assert uri.startswith("data:image/jpeg;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


@pytest.fixture(scope="module")
def outdir(tmp_path_factory):
    """A run of six classes, of which class 4 vanished, with its page."""
    outdir = finished.write(tmp_path_factory.mktemp("page"), vanished=(4,))
    mrefali.report(outdir)
    return outdir


def test_each_tile_has_number_count_share_resolution_and_changes(outdir):
    run = mrefali.open_run(outdir)
    tiles = re.findall(r'<li data-number="(\d+)".*?</li>', read(outdir), flags=re.DOTALL)
    assert [int(number) for number in tiles] == run.by_size.tolist()
    for tile in re.findall(r"<li data-number.*?</li>", read(outdir), flags=re.DOTALL):
        k = int(re.search(r'<b class="number">(\d+)</b>', tile)[1])
        text = " ".join(re.sub(r"<[^>]+>", " ", tile).split())
        count = run.counts[-1, k]
        assert f"{k} {count} {100 * count / 60:.{1 if count < 6 else 0}f} %" in text
        assert f"{run.changed[-1, k]} changed" in text
        if k == 4:
            assert "vanished: no average" in text
            assert "<img" not in tile
        else:
            period = 2.0 * run.resolution_05_px[-1, k]  # A pixel is 2 Å
            assert re.search(rf"{period:.1f} Å / \d\.\d Å", text)


def test_pixels_are_the_unit_where_the_pixel_size_is_not_known(tmp_path):
    for i, size in enumerate((None, 1.0)):  # EMAN2 writes 1.0 where it does not know
        folder = tmp_path / str(i)
        folder.mkdir()
        outdir = finished.write(folder, pixel_size_A=size)
        mrefali.report(outdir)
        assert re.search(r"\d\.\d px / \d\.\d px", read(outdir))
        assert "Å" not in re.sub(r"<script.*?</script>", "", read(outdir), flags=re.DOTALL)
        assert data(read(outdir))["pixelSize"] is None


def test_a_resolution_that_only_the_pixels_limit_has_a_sign_for_it(outdir):
    run = mrefali.open_run(outdir)
    assert [run.in_words(px) for px in (2.0, 2.04, 7.0, np.nan)] == ["≤ 4.0 Å", "4.1 Å", "14.0 Å", "–"]


def test_the_curves_are_those_of_the_files(outdir):
    run, drawn = mrefali.open_run(outdir), data(read(outdir))
    assert drawn["criterion"] == pytest.approx(run.history["criterion"].iloc[::6].tolist())
    for k, one in enumerate(drawn["classes"]):
        assert one["counts"] == run.counts[:, k].tolist()
        if k == 4:
            assert one["frc"] == [None] * 17
        else:
            assert one["frc"] == pytest.approx(np.loadtxt(f"{outdir}/drm001{k:04d}.txt")[:, 1], abs=1e-3)


def test_members_are_shown_raw_and_moved_from_the_best_to_the_worst(outdir):
    run, stack = mrefali.open_run(outdir), mrefali.open_run(outdir).stack()
    for k, one in enumerate(data(read(outdir))["classes"]):
        members = one["members"]
        of_class = np.flatnonzero(run.pose_columns["assign"] == k)
        assert set(members["indices"]) <= set(of_class)
        assert len(members["indices"]) == min(12, len(of_class))
        assert members["peaks"] == sorted(members["peaks"], reverse=True)
        assert members["peaks"][0] == run.pose_columns["peak"][of_class].max()
        raw, moved = (picture(members[which])[:, :32].astype(float) for which in ("raw", "moved"))
        images, onto_average = run.read_members(stack, members["indices"])
        for shown, truth in ((raw, images), (moved, onto_average)):
            # y grows upward; what a JPEG loses of noise leaves 0.94, another particle correlates below 0.6
            alike = [np.corrcoef(shown.ravel(), image[::-1].ravel())[0, 1] for image in truth]
            assert alike[0] > 0.9
            assert max([0, *alike[1:]]) < 0.8


def test_pictures_have_y_growing_upward(tmp_path):
    outdir = finished.write(tmp_path)
    mrefali.report(outdir)
    average = mrefali.open_run(outdir).averages[0]
    shown = picture(re.search(r'alt="Average of class 0".*?src="([^"]+)"', read(outdir))[1]).astype(float)
    assert np.corrcoef(shown.ravel(), average[::-1].ravel())[0, 1] > 0.97
    assert np.corrcoef(shown.ravel(), average.ravel())[0, 1] < 0.8


def test_the_page_says_where_the_particles_are_not(tmp_path):
    outdir = finished.write(tmp_path, with_stack=False)
    mrefali.report(outdir)
    assert f"The particles cannot be shown: {tmp_path}/stack.hdf does not exist" in read(outdir)
    assert all(one["members"] is None for one in data(read(outdir))["classes"])


def test_another_stack_of_the_same_name_is_not_taken_for_the_particles(tmp_path):
    outdir = finished.write(tmp_path)
    mrefali.write_stack(f"{tmp_path}/other.hdf", np.zeros((61, 32, 32), np.float32))
    (tmp_path / "other.hdf").rename(tmp_path / "stack.hdf")
    mrefali.report(outdir)
    assert "has 61 images of 32 px now, but 60 of 32 px were aligned" in read(outdir)


def test_a_stack_is_found_from_the_folder_of_the_run(tmp_path, monkeypatch):
    outdir = finished.write(tmp_path, stack="stack.hdf", folder=str(tmp_path))
    monkeypatch.chdir("/")
    assert mrefali.open_run(outdir).stack().n_images == 60


def test_nothing_reaches_the_page_unescaped(tmp_path):
    outdir = finished.write(tmp_path, with_stack=False, stack=HOSTILE, user_func_name=HOSTILE, **{HOSTILE: HOSTILE})
    with open(f"{outdir}/mrefali.log", "a") as file:
        file.write(f"2026-01-01 00:00:00,000 WARNING {HOSTILE}\n2026-01-01 00:00:00,000 ERROR   ended {HOSTILE}\n")
    mrefali.report(outdir)
    text = read(outdir)
    assert "onerror=alert(1)&gt;" in text
    assert "<img src=x" not in text
    assert 'title="taken"' not in text
    assert len(re.findall("<script", text)) == 2


def test_the_page_allows_its_own_script_alone_and_no_request(outdir):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', read(outdir))[1]
    assert re.fullmatch("default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
                        "script-src 'sha256-[A-Za-z0-9+/]{43}='", policy)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', read(outdir))


@pytest.mark.jit_only
@pytest.mark.parametrize("box", [64, pytest.param(160, marks=pytest.mark.slow)])
def test_a_page_of_two_hundred_classes_stays_below_ten_megabytes(tmp_path, box):
    outdir = finished.write(tmp_path, n_classes=200, n_particles=1500, box=box, n_iterations=1)
    mrefali.report(outdir)
    assert 2e6 < len(read(outdir).encode()) < 10e6
    for one in data(read(outdir))["classes"]:
        if one["counts"][-1] >= 4:
            assert len(one["members"]["indices"]) >= 4


def test_the_pictures_of_many_classes_get_smaller_and_not_the_page_larger(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PICTURES_BYTES", 60_000)
    outdir = finished.write(tmp_path, n_classes=12, n_particles=120)
    mrefali.report(outdir)
    text = read(outdir)
    assert sum(map(len, re.findall(r"data:image/jpeg;base64,[^\"]+", text))) < 60_000
    assert max(len(one["members"]["indices"]) for one in data(text)["classes"]) < 10


def test_what_the_log_warns_of_is_not_said_twice_where_it_is_a_finding(tmp_path):
    outdir = finished.write(tmp_path, n_particles=600)
    name = tmp_path / "out/history.csv"
    name.write_text(name.read_text().replace(",5,0.5,", ",5,0.95,"))
    (title, said), = findings.findings(mrefali.open_run(outdir))
    with open(f"{outdir}/mrefali.log", "a") as file:
        file.write(f"2026-01-01 00:00:01,000 WARNING {title}. {said}\n2026-01-01 00:00:02,000 WARNING another thing\n")
    mrefali.report(outdir)
    text = read(outdir)
    assert text.count("Classes show the same view: 0 and 5") == 1
    assert "another thing" in text


def test_a_tile_says_which_class_is_most_alike_and_its_facts_the_mean_peak_and_the_detail(outdir):
    text, run = read(outdir), mrefali.open_run(outdir)
    last = run.n_references - 1
    assert f"like {last} (0.50)</span>" in text
    assert (f"; mean peak {run.mean_peak[-1, 0]:.4g}; most like class {last} (likeness 0.50); "
            "detail 100 % of the median class's") in text
    vanished = re.search(r'<li data-number="4".*?</li>', text, flags=re.DOTALL)[0]
    assert "like" not in vanished


def test_like_warnings_are_shown_once(tmp_path):
    outdir = finished.write(tmp_path)
    with open(f"{outdir}/mrefali.log", "a") as file:
        for i in range(3):
            file.write(f"2026-01-01 00:00:0{i},000 WARNING iteration {i}: the centres of classes {i}, 7 lie far out\n")
        file.write("2026-01-01 00:00:09,000 WARNING another thing\nof two lines\n")
    mrefali.report(outdir)
    text = read(outdir)
    assert "iteration 2: the centres of classes 2, 7 lie far out" in text
    assert "(and 2 more like it)" in text
    assert "iteration 1: the centres" not in text
    assert "another thing\nof two lines" in text


# ---- at the end of a run, and while it runs


def run_small(folder, **options):
    stack, refs = small.write(folder)
    mrefali.mref_ali2d(stack, refs, str(folder / "out"), maxit=3, **small.OPTIONS | options)
    return folder / "out"


def test_a_run_ends_with_its_page(tmp_path, capsys):
    stack, refs = small.write(tmp_path)
    assert cli.main(["mref_ali2d", stack, refs, str(tmp_path / "out"), *small.WORDS, "--maxit=2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"the page of the run: {tmp_path}/out/report.html"
    text = read(tmp_path / "out")
    assert "finished after 2 iterations" in text
    assert "<body>" in text  # does not load itself anew


def test_without_the_extra_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "VIZ", ("numpy", "no_such_package"))
    stack, refs = small.write(tmp_path)
    words = [stack, refs, str(tmp_path / "out"), *small.WORDS, "--maxit=1"]
    assert cli.main(["mref_ali2d", *words]) == 0
    said = capsys.readouterr().out
    assert said.count("mrefali[viz]") == 1
    assert said.endswith(f"for a page of pictures: pip install 'mrefali[viz]', then mrefali report {tmp_path}/out\n")
    assert not (tmp_path / "out/report.html").exists()
    assert cli.main(["report", str(tmp_path / "out")]) == 2
    assert "the report needs no_such_package: pip install 'mrefali[viz]'" in capsys.readouterr().err
    before = small.snapshot(tmp_path)
    assert cli.main(["mref_ali2d", stack, refs, str(tmp_path / "out2"), *small.WORDS, "--live"]) == 2
    assert "live needs no_such_package" in capsys.readouterr().err
    assert small.snapshot(tmp_path) == before


def test_a_live_page_is_written_after_each_iteration(tmp_path, monkeypatch):
    pages, write = [], page.write_page

    def write_and_keep(run, *arguments, **options):
        path = write(run, *arguments, **options)
        pages.append(read(run.path))
        return path

    monkeypatch.setattr(page, "write_page", write_and_keep)
    run_small(tmp_path, live=True)
    states = [re.search(r'class="state \w+">(.*?)</span>', text)[1] for text in pages]
    assert states == [*(f"unfinished: {i} of 3 iterations" for i in (1, 2, 3)), "finished after 3 iterations"]
    assert ["<body data-live>" in text for text in pages] == [True, True, True, False]


def test_a_live_page_that_fails_does_not_end_the_run_but_keeps_its_traceback(tmp_path, monkeypatch, caplog):
    calls = []

    def fail(*arguments, **options):
        calls.append(arguments)
        raise ZeroDivisionError("in the page")

    monkeypatch.setattr(page, "write_page", fail)
    with caplog.at_level(logging.WARNING, "mrefali"), pytest.raises(ZeroDivisionError, match="in the page") as caught:
        run_small(tmp_path, live=True)
    assert caught.traceback[-1].name == "fail"
    assert len(calls) == 1
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "the report failed (ZeroDivisionError: in the page): the run goes on without it"]
    assert (tmp_path / "out/multi_ref.hdf").exists()
    assert (tmp_path / "out/aqm002.hdf").exists()
    assert None not in mrefali.open_stack(tmp_path / "stack.hdf").column("assign")


def test_a_full_disk_at_the_page_leaves_one_line_that_says_the_run_is_done(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(page, "write_page", fail)
    with pytest.raises(RunFailed, match="No space left on device; but the run is done: averages in .*, poses and"):
        run_small(tmp_path)
    assert None not in mrefali.open_stack(tmp_path / "stack.hdf").column("assign")


# ---- what is refused


@pytest.mark.parametrize(("make", "message"), [
    (lambda folder: None, "no such directory: give the OUTDIR"),
    (lambda folder: folder.mkdir(), "has no parameters.json: give the OUTDIR of a run"),
    (lambda folder: (folder.mkdir(), (folder / "parameters.json").write_text("{")), "cannot be read: Expecting"),
])
def test_what_is_no_run_is_refused(tmp_path, make, message, capsys):
    make(tmp_path / "out")
    assert cli.main(["report", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_a_finished_iteration_has_no_page(tmp_path):
    outdir = finished.write(tmp_path, n_iterations=1)
    (tmp_path / "out/history.csv").unlink()
    with pytest.raises(InputError, match="no iteration is finished yet: see mrefali watch"):
        mrefali.report(outdir)
    assert not (tmp_path / "out/report.html").exists()


def test_the_command_line_needs_no_package_of_the_page_for_its_help():
    code = "import sys, mrefali.cli as c; c.main(['--help']); print({'jinja2','PIL','matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()"
