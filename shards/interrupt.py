"""Ctrl-C ends a command once, with exit code 130, and nothing interrupts the cleaning up.

`timeout -s INT`, job schedulers and some terminals send SIGINT to a process and to its group, so it
arrives twice within microseconds. A second KeyboardInterrupt in the middle of stopping a process
pool would leave the pool in a state in which it never ends.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_arrived = False
EXIT_CODE = 130
"""128 + SIGINT, as shells report it."""


class Interrupted(KeyboardInterrupt):
    """SIGINT arrived.

    A class of its own, because Python ends itself by a signal (exit code -2 instead of 130) where a
    plain KeyboardInterrupt has passed through `exec`, as in the definition of a dataclass.
    """


def run_command(main: Callable[[], int]) -> int:
    """Runs the command line of a process; returns its exit code.

    The first SIGINT raises `Interrupted`, later ones are ignored until the process ends.
    """
    signal.signal(signal.SIGINT, _raise_once)
    try:
        return main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_CODE
    finally:
        # At its end Python replaces a handler that is a function by the default one, and a further
        # signal would kill the process. It leaves SIG_IGN.
        if _arrived:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _raise_once(_number: int, _frame: FrameType | None) -> None:
    global _arrived
    _arrived = True
    signal.signal(signal.SIGINT, _ignore)
    raise Interrupted


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Used instead of SIG_IGN. If a signal arrives just before SIG_IGN is set, Python prints a
    traceback about a race condition."""


def check() -> None:
    """Raises `Interrupted` if SIGINT has arrived; for long work to call now and then.

    Python drops an exception that a handler raises inside a destructor: the work would continue.
    """
    if _arrived:
        raise Interrupted


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Ignores SIGINT inside the block; for cleaning up. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _ignore)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Blocks SIGINT inside the block. Processes started in it never see SIGINT.

    A signal that arrives meanwhile is delivered to this process at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _postponed():
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _postponed() -> Iterator[None]:
    """Postpones the handler of SIGINT to the end of the block.

    A mask holds for one thread. Another thread, such as those of numpy, can take the signal, and
    then Python runs the handler in the main thread in spite of its mask.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            signal.raise_signal(signal.SIGINT)
