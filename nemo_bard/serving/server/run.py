"""Starting and ending the local server."""

from __future__ import annotations

import ipaddress
import resource
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from nemo_bard.evaluation.responder import load_checkpoint
from nemo_bard.serving.server.app import make_app
from nemo_bard.serving.server.settings import KEY_VARIABLE, ServerSettings

KEEP_ALIVE_SECONDS = 5
FILES = 4096
"""Open connections and files; many systems begin with 1024."""


def serve(folder: Path, settings: ServerSettings, *, device: str | None, dtype: str) -> None:
    """Serve a checkpoint until SIGTERM or SIGINT.

    Args:
        folder: A BARD checkpoint.
        settings: Address and limits.
        device: See ``load_checkpoint``.
        dtype: See ``load_checkpoint``.

    Raises:
        ValueError: If the address cannot be had, or the checkpoint cannot be loaded.
    """
    with bind(settings.host, settings.port) as listener:
        model, processor = load_checkpoint(folder, device=device, dtype=dtype)
        name = settings.served_model_name or folder.resolve().name
        app = make_app(model, processor, name, settings)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
        )
        listener.listen(config.backlog)  # who reads the next line may ask at once
        sys.stderr.write(f"{name}: http://{address(listener)} (page at /, API at /v1)\n")
        if settings.api_key is None and not is_local(listener):
            sys.stderr.write(f"everybody who reaches {settings.host} can use it; {KEY_VARIABLE} would be its key\n")
        sys.stderr.flush()
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn ends in order, and then sends the signal once more
            signal.signal(number, lambda *_: None)
        uvicorn.Server(config).run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """Take an address; nobody is listened to yet.

    Raises:
        ValueError: If it cannot be had.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        raise ValueError(f"host {host}, port {port} cannot be had ({error.strerror}); choose another --port") from error
    return listener


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def address(listener: socket.socket) -> str:
    """``host:port`` of a socket."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
