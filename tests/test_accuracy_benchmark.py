"""The benchmark behind docs/accuracy.md: a small case from simulation to row, and its command line."""

import importlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mrefali.geometry import ring_lengths

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "accuracy"


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK)
    yield importlib.import_module("cases")
    del sys.modules["cases"]


@pytest.fixture
def table(monkeypatch, cases):
    """What makes rows and pages of ``cases``."""
    specification = importlib.util.spec_from_file_location("accuracy_benchmark", BENCHMARK / "__main__.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.jit_only
def test_a_small_case_comes_within_the_grid_and_the_bound_of_the_truth(cases):
    case = cases.Case("two views", views=2)
    found = cases.evaluate_case(case, 1.0, 0)
    n = case.views * cases.PARTICLES_A_VIEW
    for start, run in found.items():
        assert run["particles"] == n
        assert (run["class_share"], run["adjusted_rand"], run["mirror_share"], run["empty_classes"]) == (1, 1, 1, 0)
        assert run["gross_share"] == 0
        # a step d adds d / sqrt(12) on each axis; poor references, which become averages, have errors too
        multiple = {"true": 1.5, "poor": 2.0}[start]
        most = math.hypot(1 / math.sqrt(6), multiple * run["shift_bound"])
        # e^2 of an even distribution scatters by sqrt(0.8) of its mean, so the rms of n pairs by sqrt(0.1 / n)
        assert run["shift_bound"] < run["shift_error_rms"] < most * (1 + 4 * math.sqrt(0.1 / n))
        # no estimate is better than the bound; the rms of n normal numbers scatters by 1 / sqrt(2 n)
        assert run["angle_multiple_of_bound"] > 1 - 4 / math.sqrt(2 * n)
        # the angle goes in steps, and has its share of the shift's error: half a step
        half_step = 180 / ring_lengths(np.array([case.run["ou"]]))[0]
        assert run["angle_error_rms"] < math.hypot(half_step, multiple * run["angle_bound"])
        # the blobs, the smallest of which have a sigma of 0.9 px, hold nothing beyond Nyquist
        assert 2 <= run["resolution_px"] < 4


def test_a_row_has_the_mean_and_the_deviation_over_the_seeds(table):
    runs = [dict.fromkeys([name for _, _, name, _ in table.COLUMNS], value) for value in (0.25, 0.75)]
    runs[1]["resolution_px"] = None
    cells = table.row("hard", 0.1, runs).strip("| ").split(" | ")
    assert len(cells) == len(table.HEAD[0].split(" | ")) == len(table.HEAD[1].strip("|").split("|"))
    assert cells[:4] == ["hard", "0.1", "50.0 ± 35.4", "0.500 ± 0.354"]
    assert cells[-3] == "nan ± nan"


def test_the_page_gets_both_tables_and_keeps_the_rest(table, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "PAGE", tmp_path / "accuracy.md")
    marks = "above\n<!-- table: poor -->\nold\n<!-- end -->\nbetween\n<!-- table: true -->\nold\n<!-- end -->\nbelow\n"
    table.PAGE.write_text(marks)
    table.write_page({"poor": ["a", "b"], "true": ["c"]})
    assert table.PAGE.read_text() == marks.replace("old", "a\nb", 1).replace("old", "c")


def test_a_mistyped_option_ends_it_before_anything_is_simulated():
    done = subprocess.run([sys.executable, BENCHMARK, "--snrs=0.1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--snrs=0.1" in done.stderr
    assert done.stdout == ""
