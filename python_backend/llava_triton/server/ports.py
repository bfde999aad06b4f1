"""Choosing and checking TCP ports."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Mapping

from llava_triton.server.server_error import ServerError


class PortError(ServerError):
    """A port cannot be used; the sentence names it and what to change."""


def check_ports(host: str, ports: Mapping[str, int]) -> None:
    """Make sure that a server may listen on each port.

    Args:
        host: the address it will listen on.
        ports: port by the name of its service: `http`, `grpc`, `metrics`.

    Raises:
        PortError: a port is named twice, out of range, taken or not allowed.
    """
    owners: dict[int, str] = {}
    for service, port in ports.items():
        change = f"choose another with --{service}-port (make: {service.upper()}_PORT=)"
        if not 0 < port < 65536:
            raise PortError(f"port {port} ({service}) is not between 1 and 65535; {change}")
        if port in owners:
            raise PortError(f"port {port} is given for both {owners[port]} and {service}; {change}")
        owners[port] = service
        reason = _refusal(host, port)
        if reason is not None:
            raise PortError(f"port {port} ({service}) on {host} {reason}; {change}")


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that nobody listens on, all different.

    They lie below the range that the kernel gives to outgoing connections, so that no client
    takes one by chance before its server does.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), k=2_000):
        if len(found) == count:
            break
        if _refusal(host, port) is None:
            found.append(port)
    if len(found) < count:
        raise PortError(f"no {count} free ports found on {host}")
    return found


def _refusal(host: str, port: int) -> str | None:
    """Why nobody may listen on a port, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Connections of an earlier server that are still winding down do no harm.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "is already taken by another program"
            return f"cannot be used ({os.strerror(error.errno or 0)})"
    return None
