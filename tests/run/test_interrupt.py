import os
import signal
import threading

import pytest

from polyspan.run import first_interrupt_finishes


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_interrupt_is_a_request_and_the_second_stops():
    with first_interrupt_finishes() as state:
        assert not state.requested
        press()
        assert state.requested
        with pytest.raises(KeyboardInterrupt):
            press()


def test_the_handler_is_as_before_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with first_interrupt_finishes() as state:
        press()
    assert state.requested
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        press()


def test_two_blocks_do_not_share_their_requests():
    with first_interrupt_finishes() as first:
        press()
    with first_interrupt_finishes() as second:
        assert (first.requested, second.requested) == (True, False)


def test_outside_the_main_thread_it_changes_nothing():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with first_interrupt_finishes() as state:
            seen.append((state.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
