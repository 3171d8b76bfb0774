"""Signals that end a run: one exception for SIGINT, SIGTERM and SIGUSR1. Imports errors of ours only."""

import signal
import threading
import time
from contextlib import contextmanager

from mrefali.errors import Stopped

#: From the terminal, from a batch system that ends the job, and from one that warns of it.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

#: A signal that comes so long after the last, in seconds, is no launcher's repetition of it.
REPEATED_S = 1.0

_received = []  # numbers, and when they came


@contextmanager
def stopping():
    """Have these signals raise ``Stopped`` in the main thread, as long as the context lasts.

    A launcher may repeat one while this process is about to end, and such a repetition does not. One that the process
    was started to ignore, as a shell does with SIGINT in the background, stays ignored.
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
            raise Stopped(_received[0][0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def received():
    """The number of the signal that has come; None if none has."""
    return _received[0][0] if _received else None


def check():
    """Raise ``Stopped`` if a signal has come whose exception was lost, as it can be in a callback of the compiler's."""
    if _received:
        raise Stopped(_received[0][0])


def _stop(number, frame):
    now = time.monotonic()
    repeated = bool(_received) and now < _received[-1][1] + REPEATED_S
    _received.append((number, now))
    if not repeated:
        raise Stopped(number)
