"""Runs every notebook beside this file from a clean kernel, in a directory of its own, and keeps the outputs."""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path):
    """Run the notebook at ``path`` and write it back; a cell that fails raises."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # no times of execution: nothing changes in the file when nothing has changed in the results
        NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False,
                       resources={"metadata": {"path": folder}}).execute()
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        print(path.name)
        execute(path)
