"""What launchers and machines say of themselves; the ranks themselves are in test_mpi.py."""

import os
from types import SimpleNamespace

import pytest

from mrefali import parallel
from mrefali.errors import InputError
from mrefali.parallel import LAUNCHER_SIZES, SERIAL, STEP_SIZE, Mpi, launched_size


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*LAUNCHER_SIZES, STEP_SIZE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", LAUNCHER_SIZES)
@pytest.mark.parametrize(("text", "size"), [("4", 4), ("1", 1), ("", 1)])
def test_a_launcher_says_how_many_processes_it_started(monkeypatch, name, text, size):
    monkeypatch.setenv(name, text)
    assert launched_size() == size


@pytest.mark.parametrize(("terminal", "size"), [(False, 3), (True, 1)])
def test_srun_started_many_but_who_types_in_its_shell_one(monkeypatch, terminal, size):
    monkeypatch.setenv(STEP_SIZE, "3")
    monkeypatch.setattr(os, "isatty", lambda descriptor: terminal)
    assert launched_size() == size


@pytest.mark.parametrize("text", ["x", "-2", "1.5", " "])
def test_a_size_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv("PMI_SIZE", text)
    with pytest.raises(InputError, match=f"^PMI_SIZE={text} in the environment, .* is no number: unset PMI_SIZE$"):
        launched_size()


class Communicator:
    """Of ranks that all have at hand what each of them says."""

    def __init__(self, rank, said):
        self.rank, self.said = rank, said

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return len(self.said)

    def allgather(self, value):
        return list(self.said)


@pytest.mark.parametrize(("masks", "sharers"), [
    ([("a", {0, 1, 2, 3})] * 3, [3, 3, 3]),
    ([("a", {0, 1}), ("a", {2, 3})], [1, 1]),  # each rank bound to its own
    ([("a", {0, 1}), ("b", {0, 1})], [1, 1]),  # on two machines
    ([("a", {0, 1}), ("a", {0, 1}), ("a", {2, 3}), ("a", {2, 3})], [2, 2, 2, 2]),  # two to a socket
])
def test_cores_are_shared_by_the_ranks_of_a_machine_that_may_use_the_same(monkeypatch, masks, sharers):
    found = []
    for rank, (_, mask) in enumerate(masks):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, mask=mask: mask)
        found.append(Mpi(Communicator(rank, masks), None).cores())
    assert found == [(len(mask), n) for (_, mask), n in zip(masks, sharers, strict=True)]


@pytest.mark.parametrize("machines", [["a", "a", "b", "a", "b", "c"]])
def test_the_first_rank_of_each_machine_leads_it(monkeypatch, machines):
    found = []
    for rank, machine in enumerate(machines):
        monkeypatch.setattr(os, "uname", lambda machine=machine: SimpleNamespace(nodename=machine))
        found.append(Mpi(Communicator(rank, machines), None).leads_machine())
    assert found == [True, False, True, False, False, True]
    assert SERIAL.leads_machine()


def test_one_process_has_its_cores_alone():
    assert SERIAL.cores() == (len(os.sched_getaffinity(0)), 1)


# ---- exceptions --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rank", [0, 1, 2])
def test_all_ranks_raise_what_the_first_refuses_and_only_the_root_speaks(monkeypatch, rank):
    monkeypatch.setattr(parallel.atexit, "register", None)  # none may abort
    refusals = [None, InputError("one"), InputError("two")]
    comm = Mpi(Communicator(rank, refusals), None)

    def check():
        with comm.ending_together(), comm.agreeing():
            if refusals[rank] is not None:
                raise refusals[rank]

    with pytest.raises(InputError, match="^one$") as caught:
        check()
    assert hasattr(caught.value, "said_by_root") is (rank != 0)


def test_where_all_agree_that_nothing_is_wrong_all_go_on():
    with Mpi(Communicator(0, [None, None]), None).agreeing():
        reached = True
    assert reached


@pytest.mark.parametrize(("error", "size", "statuses"), [
    (ZeroDivisionError("bug"), 2, [1]), (KeyboardInterrupt("stop"), 2, [130]), (InputError("late"), 2, [1]),
    (ZeroDivisionError("bug"), 1, [])])
def test_an_exception_aborts_all_ranks_when_this_one_ends(monkeypatch, error, size, statuses):
    at_exit = []
    monkeypatch.setattr(parallel.atexit, "register", lambda function, status: at_exit.append(status))
    with pytest.raises(type(error), match=str(error)), Mpi(Communicator(0, [None] * size), None).ending_together():
        raise error
    assert at_exit == statuses


def test_one_process_lets_exceptions_pass():
    with pytest.raises(InputError, match="^no$"), SERIAL.ending_together(), SERIAL.agreeing():
        raise InputError("no")
