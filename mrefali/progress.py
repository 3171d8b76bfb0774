"""How far an iteration has come, for a person who watches: a bar in a terminal, a line in Jupyter, nothing in a file.

Imports nothing of ours. tqdm's own bar for notebooks wants ipywidgets, and warns without them.
"""

import io
import sys

from tqdm import tqdm


class Progress(tqdm):
    """A bar with particles/s, the time left for the iteration, and that for all iterations together.

    Parameters
    ----------
    n_particles : int
        Of one iteration.
    number, n_iterations : int
        This iteration, from 0, and how many there will be at most.
    shown : bool
        False for no bar at all; else there is one in a terminal.
    """

    def __init__(self, n_particles, number, n_iterations, shown, **options):
        self._later = (n_iterations - number - 1) * n_particles
        options = {"disable": None, "file": sys.stderr} | options
        super().__init__(total=n_particles, desc=f"iteration {number}", unit=" particles", leave=False,
                         **options | ({} if shown else {"disable": True}))

    @property
    def format_dict(self):
        values = super().format_dict
        rate = values["rate"] or (values["n"] - values["initial"]) / max(values["elapsed"], 1e-9)
        if rate and self._later:
            left = (values["total"] - values["n"] + self._later) / rate
            values["postfix"] = f"all iterations {self.format_interval(left)} left"
        return values


class JupyterProgress(Progress):
    """The same as a line below the cell, one for all iterations of a run, empty when an iteration is done."""

    _handle = None

    def __init__(self, n_particles, number, n_iterations, shown):
        from IPython.display import display

        if number == 0 or self._handle is None:
            JupyterProgress._handle = display({"text/plain": ""}, raw=True, display_id=True)
        super().__init__(n_particles, number, n_iterations, shown, file=io.StringIO(), disable=False, ncols=100)

    def display(self, msg=None, pos=None):
        """Show the line as it stands, or nothing where ``msg`` is empty."""
        self._handle.update({"text/plain": str(self) if msg is None else msg}, raw=True)
        return True


def progress(n_particles, number, n_iterations, shown):
    """The bar that suits where this process runs; see :class:`Progress`."""
    kind = JupyterProgress if shown and _in_jupyter() else Progress
    return kind(n_particles, number, n_iterations, shown)


def _in_jupyter():
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None
