"""Stacks larger than memory: what a run takes does not grow with the pixels, and is what it said before it started."""

import re

import large
import pytest

#: What is promised of a particle, bytes: 200 and its pose.
PROMISED = 200 + 32


def estimate_bytes(said):
    return 2**20 * float(re.search(r"about (\d+) MB of memory a rank", "\n".join(said))[1])


@pytest.mark.jit_only
def test_memory_grows_by_no_more_than_promised_of_each_particle(tmp_path):
    """30,000 particles more are 123 MB more of pixels, and 7 MB of all else.

    Four times as many: tables that grow by doubling are then as full as before.
    """
    peaks = []
    for n_particles in (1000, 10_000, 40_000):
        words = [*large.write(tmp_path, n_particles, 32), str(tmp_path / f"out{n_particles}")]
        said, measured = large.run_measured(*words, "--ou=8", "--xr=1", "--maxit=1", block_bytes=1 << 20)
        assert measured["status"] == 0
        peaks.append(measured["peak_bytes"])
        assert peaks[-1] == pytest.approx(estimate_bytes(said), rel=0.15)
    assert peaks[2] - peaks[1] < 30_000 * PROMISED


@pytest.mark.slow
@pytest.mark.jit_only
def test_200_000_particles_of_64_px_take_less_than_700_mb(tmp_path):
    """3.3 GB of pixels. The limit asked for is kept, and makes no difference to what is found."""
    stack, refs = large.write(tmp_path, 200_000, 64)
    peaks, averages = [], []
    for name, limit in (("whole", "700MB"), ("small", "360MB")):
        said, measured = large.run_measured(stack, refs, str(tmp_path / name), "--ou=27", "--xr=2",
                                            "--yr=2", "--maxit=1", f"--max_memory={limit}", block_bytes=64 << 20)
        assert measured["status"] == 0
        assert measured["peak_bytes"] == pytest.approx(estimate_bytes(said), rel=0.15)
        peaks.append(measured["peak_bytes"])
        averages.append((tmp_path / name / "drm0000000.txt").read_bytes())
    assert peaks[0] < 700 << 20
    assert peaks[1] < 1.05 * (360 << 20)
    assert averages[0] == averages[1]
