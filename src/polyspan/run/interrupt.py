"""Ctrl-C once: finish the piece at hand and stop. Twice: stop now."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager


class Interrupt:
    """``requested`` turns true at the first Ctrl-C; a loop asks it between two pieces."""

    requested: bool = False


@contextmanager
def first_interrupt_finishes() -> Generator[Interrupt]:
    """Turn the first Ctrl-C inside the block into a request; the second raises KeyboardInterrupt as usual.

    Outside the main thread, where Python delivers no signals, the block changes nothing.
    """
    state = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    # None: a handler that was not set from Python, which cannot be put back.
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def ask(signum, frame):  # noqa: ARG001 - the form of a signal handler
        state.requested = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, before)
