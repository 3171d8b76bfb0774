"""The exceptions of our own, and what a failure says in one line. Imports nothing of ours."""

import os


class InputError(ValueError):
    """A call or a file that cannot be used, found before any work was done.

    The message is one line: the name, the value got, what is allowed and the way out. The command line prints
    it and exits with status 2; every other exception but ``RunFailed`` is a bug and keeps its traceback.
    """


class RunFailed(RuntimeError):
    """A run that could not go on, for what happened to its files after it had begun.

    The message is one line, which says where the results are; the command line prints it and exits with status 1.
    """


#: What a bad call or file raises before anything is created: one line, exit status 2.
REFUSALS = (InputError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def one_line(error):
    """The message of an exception; of one that the operating system raised, the file and the reason."""
    from_system = isinstance(error, OSError) and error.filename is not None
    message = f"{os.fsdecode(error.filename)}: {error.strerror}" if from_system else str(error)
    return message.replace("\n", "\\n")
