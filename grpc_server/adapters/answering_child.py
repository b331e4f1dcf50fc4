"""The other end of `answering_process`: answers questions until it is told to end, or one of them ends it."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable

MEMORY_BYTES = 2 << 30


def answer_questions(make: Callable[[], Callable[[str], str]]) -> None:
    """Answer each line of stdin with a line on stdout, until stdin closes.

    A question that takes more processor time than the seconds in the first argument, or too much memory, ends
    the process, by the kernel's hand.

    Args:
        make: gives what answers a line; it has loaded all that it needs by then.
    """
    seconds = float(sys.argv[1])
    # A terminal's Ctrl-C or a service manager's SIGTERM is for the parent, which lets streams finish first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would hold what callers sent
    answered = make()
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # then SIGPROF, which ends it
        reply = answered(line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)
