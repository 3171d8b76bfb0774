"""Whole iterations on one thread: the stack on disk is read, searched, summed, and made into new references."""

import numba
import pytest
from measure import write_files
from threadpoolctl import threadpool_limits

from mrefali.checks import Options, prepare
from mrefali.io import open_stack
from mrefali.parallel import SERIAL
from mrefali.refine import refine


@pytest.mark.parametrize(("box", "outer_radius", "n_references", "n_particles"), [
    (64, 27, 3, 1000), (64, 27, 10, 1000), (128, 55, 10, 200), (128, 55, 50, 200)])
def test_iteration(benchmark, tmp_path, box, outer_radius, n_references, n_particles):
    stack, references = map(open_stack, write_files(tmp_path, box, 3, n_references, n_particles))
    numba.set_num_threads(1)
    with threadpool_limits(1):
        plan = prepare(stack, references, Options(
            mask=None, ir=1, ou=outer_radius, rs=1, xr=3, yr=3, ts=1, center=1, maxit=1, function="ref_ali2d",
            rand_seed=1000, vanished="random", center_limit=None, quiet=True), SERIAL)

        def iterate():
            return list(refine(plan.particles, plan.references, plan.poses, plan.settings, SERIAL))

        benchmark.pedantic(iterate, rounds=3, warmup_rounds=1)
