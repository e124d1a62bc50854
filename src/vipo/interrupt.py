"""Ctrl-C and SIGTERM as a request to stop at the next good place."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Call it to learn whether the process was asked to stop.

    Attributes:
        reason: name of the signal; empty before.
    """

    reason = ""

    def __call__(self) -> bool:
        return bool(self.reason)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Take the first Ctrl-C or SIGTERM of a block as a request; the next one acts at once, as it always does.

    Outside the main thread, where Python allows no handlers, and for a signal that the process was started to ignore
    (nohup, a shell's background jobs) nothing changes. The handlers found are put back at the end.
    """
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.reason = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        text = f"\nvipo: {stop.reason}: finishing this iteration, then saving; Ctrl-C again exits at once\n"
        os.write(2, text.encode())  # print may not be entered twice

    main = threading.current_thread() is threading.main_thread()
    before = {
        number: signal.getsignal(number)
        for number in SIGNALS
        if main and signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
