"""All is compiled before a run needs it, and by one rank of each machine."""

import pytest
import small

import mrefali
from mrefali import warmup
from mrefali.compiled import kernels
from mrefali.fourier import INTERPOLATIONS
from mrefali.parallel import SERIAL


@pytest.mark.jit_only
def test_a_run_calls_nothing_that_the_warm_up_has_not(tmp_path):
    """Were a type another, all ranks would compile it at the same time."""
    warmup.compile_kernels(SERIAL, "equal")
    called = ("search", "search_each", "assign_within", "describe", "subtract_and_divide", "transform", "read_turned",
              "add_to_classes", "sharpen")
    before = {name: len(getattr(kernels, name).signatures) for name in called}
    assert min(before.values()) >= 1
    files = small.write(tmp_path)
    for interpolation in INTERPOLATIONS:
        mrefali.mref_ali2d(*files, str(tmp_path / interpolation), maxit=2, subpixel=True, interpolation=interpolation,
                           **small.OPTIONS)
    mrefali.mref_ali2d(*files, str(tmp_path / "equal"), maxit=2, assignment="equal", **small.OPTIONS)
    assert {name: len(getattr(kernels, name).signatures) for name in called} == before
    assert {*called} - {"assign_within"} == {name for name, value in vars(kernels).items()
                                             if getattr(value, "targetoptions", {}).get("parallel")}


class Ranks:
    """One rank of several, which notes what happens when."""

    def __init__(self, is_root, leads, events):
        self.is_root, self.leads, self.events = is_root, leads, events

    def leads_machine(self):
        return self.leads

    def barrier(self):
        self.events.append("barrier")


@pytest.mark.parametrize(("is_root", "leads", "expected"), [
    (True, True, ["compile", "barrier", "barrier"]), (False, True, ["barrier", "compile", "barrier"]),
    (False, False, ["barrier", "barrier"])])
def test_the_root_compiles_first_then_one_of_each_machine(monkeypatch, is_root, leads, expected):
    events = []
    monkeypatch.setattr(warmup, "_run_all", lambda: events.append("compile"))
    warmup.compile_kernels(Ranks(is_root, leads, events))
    assert events == expected
