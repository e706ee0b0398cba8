"""TCP ports of this machine."""

import random
import socket
from contextlib import suppress

from .errors import StartError

# Above the ports of Ray's workers, below those of its gateways and of Linux's ephemeral connections.
FREE_PORTS = range(20_000, 30_000)


def check_port(host: str, port: int) -> None:
    """
    Raises:
        StartError: another program listens there, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"Cannot listen on {host}:{port} ({error.strerror})."
            raise StartError(f"{reason} Choose another HUB_HOST or HUB_PORT.") from error


def free_port() -> int:
    """Return a free port that neither Linux nor Ray assigns to other programs.

    Seconds may pass until the caller's program listens there.

    Raises:
        StartError: no port of the range is free.
    """
    for port in random.sample(FREE_PORTS, len(FREE_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise StartError(f"No port from {FREE_PORTS.start} to {FREE_PORTS.stop - 1} is free. Stop other programs.")
