"""Damaged files are refused in one line or read right; no file ends the interpreter, hangs it or fills the memory."""

import fuzz
import hypothesis
import hypothesis.strategies as st
import pytest

from mrefali.errors import REFUSALS
from mrefali.headers import read_table
from mrefali.io import open_stack

#: Files of each format, for at least 2,000 and 20,000 of all that there are.
FEW, MANY = (-(-n // len(fuzz.FORMATS)) for n in (2000, 20_000))


@pytest.mark.jit_only
@pytest.mark.parametrize("n", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_damaged_files_are_refused_or_read_right(tmp_path, name, n):
    count, told = fuzz.run(name, n, n, tmp_path)
    assert (count.get("wrong"), told) == (0, "")
    assert count["read"] + count["refused"] == n
    assert count["refused"] > n // 10  # so the damage does reach what is read


def raising(error):
    def read(folder):
        raise error
    return read


@pytest.mark.parametrize(("read", "told"), [
    (raising(MemoryError()), "MemoryError"), (raising(KeyError("x")), "KeyError"),
    (raising(fuzz.REFUSALS[0]("of two\nlines")), "more or less than one line"),
    (lambda folder: 39, "counted 39 in place of 40")])
def test_what_goes_wrong_is_counted(tmp_path, capfd, read, told):
    kind = fuzz.Format(None, read, 40)
    assert fuzz._try_one(kind, tmp_path, 40) == "wrong"
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(("fault", "status"), [("SIGSEGV", -11), ("SIGALRM", -14)])
def test_a_file_that_kills_or_hangs_its_reader_is_told(tmp_path, monkeypatch, fault, status):
    """The reader is a stand-in: its process is, like a real one, another."""
    script = tmp_path / "fuzz.py"
    body = "signal.raise_signal(signal.SIGSEGV)" if fault == "SIGSEGV" else "signal.alarm(1); signal.pause()"
    script.write_text(f"import signal, sys\nsys.path.insert(0, {str(fuzz.Path(fuzz.__file__).parent)!r})\nprint(7, "
                      f"file=sys.stderr, flush=True)\n{body}\n")
    monkeypatch.setattr(fuzz, "__file__", str(script))
    count, told = fuzz.run("table", 1, 1, tmp_path)
    assert (count, told) == ({"killed by": status}, "7")


def rows_or_refusal(path, names, n):
    """How many rows a table has that is read as one of ``n``; None if it is refused, in one line."""
    try:
        columns = read_table(path, names, n)
    except REFUSALS as error:
        lines = str(error).splitlines()
    else:
        return len(columns[names[0]])
    assert len(lines) == 1
    return None


@hypothesis.given(st.binary(max_size=300))
def test_no_bytes_are_a_table_by_mistake(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    assert rows_or_refusal(path, ["assign"], 3) in (3, None)


@hypothesis.given(st.text("0123456789.,-+eE nan\t\n\r\"'", max_size=80))
def test_no_text_of_numbers_is_read_with_another_count(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "numbers.txt"
    path.write_text(text, newline="")
    assert rows_or_refusal(path, ["xform.align2d"], 2) in (2, None)


SIGNATURE = b"\x89HDF\r\n\x1a\n"


@hypothesis.given(st.binary(max_size=600), st.sampled_from([b"", SIGNATURE, SIGNATURE + b"\0\0\0\0\0\x08\x08\0"]))
def test_no_bytes_are_a_stack_by_mistake(tmp_path_factory, data, start):
    path = tmp_path_factory.getbasetemp() / "any.hdf"
    path.write_bytes(start + data)
    with pytest.raises(REFUSALS, match=r"^[^\n]+$"):
        open_stack(path)
