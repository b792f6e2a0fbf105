"""Images from addresses: from public machines only, with limits of size, time and redirects."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from nemo_bard.base.errors import one_line, short

SECONDS = 10.0
MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)


def fetch(url: str, *, max_bytes: int, seconds: float = SECONDS, name: str = "image") -> bytes:
    """Fetch a file.

    A name is looked up once and the connection made to what was found, so that it cannot turn private in between.

    Args:
        url: An http or https address.
        max_bytes: Largest file that is taken.
        seconds: For everything together.
        name: What errors call it.

    Raises:
        ValueError: If it cannot be had: a private address, a status other than 200, too large, too slow.
    """
    deadline = time.monotonic() + seconds
    try:
        for _ in range(MAX_REDIRECTS + 1):
            answer, target = _get(url, deadline, max_bytes)
            if target is None:
                return answer
            url = urljoin(url, target)
    except TimeoutError as error:
        raise ValueError(f"{name}: {short(url)} took longer than {seconds:g} s") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"{name}: {short(url)} cannot be fetched ({one_line(error)})") from error
    raise ValueError(f"{name}: {short(url)} redirects more than {MAX_REDIRECTS} times")


def _get(url: str, deadline: float, max_bytes: int) -> tuple[bytes, str | None]:
    """The file, or where it is instead."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it is no http or https address")
    connection = http.client.HTTPConnection(parts.hostname)
    sock = _connect(parts, deadline)
    # a timeout of the socket would count from every byte anew
    timer = threading.Timer(_left(deadline), _hang_up, [sock])
    timer.start()
    try:
        connection.sock = _secured(sock, parts)
        path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        connection.request("GET", path, headers={"Host": parts.netloc.rpartition("@")[2], "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in _REDIRECTS and (target := response.getheader("Location")):
            return b"", target
        if response.status != 200:
            raise ValueError(f"status {response.status}")
        data = response.read(max_bytes + 1)
        _left(deadline)
        if len(data) > max_bytes:
            raise ValueError(f"it has more than {max_bytes} bytes")
        if response.length:
            raise ValueError(f"{response.length} bytes are missing at its end")
        return data, None
    except (OSError, http.client.HTTPException):
        _left(deadline)
        raise
    finally:
        timer.cancel()
        connection.close()
        sock.close()


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _connect(parts: SplitResult, deadline: float) -> socket.socket:
    assert parts.hostname is not None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    for *_, address in found:
        if not is_public(str(address[0])):
            raise ValueError(f"{parts.hostname} is {address[0]}, which is no public address")
    return socket.create_connection((str(found[0][4][0]), port), timeout=_left(deadline))


def _secured(sock: socket.socket, parts: SplitResult) -> socket.socket:
    if parts.scheme == "http":
        return sock
    return ssl.create_default_context().wrap_socket(sock, server_hostname=parts.hostname)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the whole internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_global and not ip.is_multicast


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
