"""The one exception of our own. Imports nothing of ours."""


class InputError(ValueError):
    """A call or a file that cannot be used, found before any work was done.

    The message is one line: the name, the value got, what is allowed and the way out. The command line prints
    it and exits with status 2; every other exception is a bug and keeps its traceback.
    """
