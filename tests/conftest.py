"""Sizes and settings that all tests share.

With ``NUMBA_DISABLE_JIT=1`` the kernels run as plain Python, some thousand times slower; ``JIT`` chooses sizes.
A test that says nothing without the compiler is marked ``jit_only``, for such a run to deselect.
"""

import hypothesis
import numba
import pytest

JIT = not numba.config.DISABLE_JIT

# the first example of a jitted test pays the compilation; the same examples each time
hypothesis.settings.register_profile("mrefali", deadline=None, derandomize=True, max_examples=100 if JIT else 25)
hypothesis.settings.load_profile("mrefali")


@pytest.fixture
def set_threads():
    """``numba.set_num_threads``, undone after the test."""
    before = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(before)
