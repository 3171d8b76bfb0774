"""The exceptions of our own, and what a failure says in one line. Imports nothing of ours."""

import os
import signal


class InputError(ValueError):
    """A call or a file that cannot be used, found before any work was done.

    The message is one line: the name, the value got, what is allowed and the way out. The command line prints
    it and exits with status 2; every other exception but ``RunFailed`` is a bug and keeps its traceback.
    """


class RunFailed(RuntimeError):
    """A run that could not go on, for what happened to its files after it had begun.

    The message is one line, which says where the results are; the command line prints it and exits with status 1.
    """


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end; the command line prints this and exits with 128 plus its number.

    Parameters
    ----------
    number : int
        Of the signal.
    state : str, optional
        How far the work has come, and how to go on.
    """

    def __init__(self, number, state=None):
        super().__init__(number, state)
        self.number, self.state = int(number), state

    def __str__(self):
        state = self.state or "what it was writing is there whole, or not at all"
        return f"stopped by {signal.Signals(self.number).name}: {state}"


#: What a bad call or file raises before anything is created: one line, exit status 2.
REFUSALS = (InputError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def one_line(error):
    """The message of an exception; of one that the operating system raised, the file and the reason."""
    from_system = isinstance(error, OSError) and error.filename is not None
    message = f"{os.fsdecode(error.filename)}: {error.strerror}" if from_system else str(error)
    return message.replace("\n", "\\n")
