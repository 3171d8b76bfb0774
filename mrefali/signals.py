"""Signals that end a run: one exception for SIGINT, SIGTERM and SIGUSR1. Imports errors of ours only."""

import signal
import threading
from contextlib import contextmanager

from mrefali.errors import Stopped

#: From the terminal, from a batch system that ends the job, and from one that warns of it.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_received = []


@contextmanager
def stopping():
    """Have these signals raise ``Stopped`` in the main thread, as long as the context lasts.

    The first alone does: a launcher may repeat it while this process is about to end. One that the process was
    started to ignore, as a shell does with SIGINT in the background, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    _received.clear()
    try:
        yield
    except Exception as error:
        if _received:  # its exception was lost in that of a library it came to
            raise Stopped(_received[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def received():
    """The number of the signal that has come; None if none has."""
    return _received[0] if _received else None


def check():
    """Raise ``Stopped`` if a signal has come whose exception was lost, as it can be in a callback of the compiler's."""
    if _received:
        raise Stopped(_received[0])


def _stop(number, frame):
    _received.append(number)
    if len(_received) == 1:
        raise Stopped(number)
