"""A port for processes that open it themselves, later."""

import random
import socket


def free_port() -> int:
    """Return a port at which nobody listens, outside of the range that the system gives away meanwhile.

    A port that the system has chosen may be another's before the process that is to have it has done its imports: of
    a listener, or of any connection that starts on this machine.
    """
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as free:
            try:
                free.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
