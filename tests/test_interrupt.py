"""vipo.interrupt: the first signal is a request, the next one acts; what a run makes of it is tested in test_resume."""

import os
import signal
import threading

import pytest

from vipo.interrupt import SIGNALS, stop_on_signals


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def usual_handlers():
    """Those of a process in the foreground: a shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_is_a_request_and_the_next_acts(number, capfd):
    before = handlers()
    with stop_on_signals() as stop:
        assert not stop() and stop.reason == ""
        os.kill(os.getpid(), number)
        assert stop() and stop.reason == number.name
        assert handlers() == [signal.default_int_handler, signal.SIG_DFL]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before
    assert f"vipo: {number.name}: finishing this iteration, then saving" in capfd.readouterr().err


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_changes_nothing():
    before, found = handlers(), []

    def work():
        with stop_on_signals() as stop:
            found.extend([handlers(), stop()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, False]
