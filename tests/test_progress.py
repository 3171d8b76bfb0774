"""The progress bar: what it says, where it is shown."""

import io
import sys
import types

import nbformat
import pytest
from nbclient import NotebookClient

from mrefali.progress import JupyterProgress, Progress, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def text_after(bar, n, seconds):
    """What a bar says when ``n`` particles took so long."""
    bar.n, bar.start_t = n, bar._time() - seconds
    return str(bar)


def test_it_has_rate_and_the_time_left_for_the_iteration_and_for_all():
    bar = Progress(100, 1, 4, True, file=Terminal())
    text = text_after(bar, 50, 10)
    bar.close()
    assert text.startswith("iteration 1:  50%")
    assert "50/100 [00:10<00:10,  5.00 particles/s, all iterations 00:50 left]" in text


def test_the_last_iteration_has_no_others_to_come():
    bar = Progress(100, 3, 4, True, file=Terminal())
    text = text_after(bar, 50, 10)
    bar.close()
    assert "all iterations" not in text


@pytest.mark.parametrize(("file", "shown", "disabled"), [
    (Terminal(), True, False), (Terminal(), False, True), (io.StringIO(), True, True)])
def test_it_is_shown_in_a_terminal_alone_and_not_where_quiet_is_asked_for(monkeypatch, file, shown, disabled):
    monkeypatch.setattr(sys, "stderr", file)
    with progress(10, 0, 1, shown) as bar:
        assert bool(bar.disable) is disabled
        bar.update(10)
    assert (file.getvalue() == "") is disabled


def test_in_a_kernel_it_is_a_line_below_the_cell(monkeypatch):
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    shown = []
    handle = types.SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))
    monkeypatch.setitem(sys.modules, "IPython.display",
                        types.SimpleNamespace(display=lambda data, raw, display_id: handle))
    bar = progress(10, 0, 2, True)
    assert isinstance(bar, JupyterProgress)
    bar.refresh()
    bar.update(10)
    bar.close()
    assert "0/10" in shown[0]
    assert "particles" in shown[0]
    assert shown[-1] == ""
    assert not isinstance(progress(10, 0, 2, False), JupyterProgress)


def test_a_real_kernel_shows_it_and_keeps_no_error_and_no_widget(tmp_path):
    code = ("import time\nfrom mrefali.progress import progress\n"
            "bar = progress(4, 0, 1, True)\nbar.refresh()\nbar.update(2)\nbar.refresh()\nkept = str(bar)")
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, (code, "bar.close()"))))
    client = NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    with client.setup_kernel():
        client.execute_cell(notebook.cells[0], 0)
        output, = notebook.cells[0].outputs
        assert output.output_type == "display_data"
        assert "2/4" in output.data["text/plain"]
        client.execute_cell(notebook.cells[1], 1)
    assert notebook.cells[0].outputs[0].data == {"text/plain": ""}
    assert notebook.cells[1].outputs == []
