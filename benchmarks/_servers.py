"""Starts vLLM's server on a free port, waits until it is ready, and ends it with all its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from _clients import Endpoint

from nemo_bard.base.processes import die_with

MODULE = "vllm.entrypoints.openai.api_server"
UNCACHED = (("--no-enable-prefix-caching",), ("--mm-processor-cache-gb", "0"))
"""A level asks prompts that a level before it asked: without these its prompts would be found in a cache."""
GRACE_S = 30.0


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def server_command(python: str, folder: Path, port: int, extra: list[str]) -> list[str]:
    """The command of a server; ``extra`` wins over what is set here."""
    given = {word.partition("=")[0].replace("--enable", "--no-enable") for word in extra if word.startswith("--")}
    words = [word for setting in UNCACHED if setting[0] not in given for word in setting]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    return [python, "-m", MODULE, "--model", str(folder), *address, *words, *extra]


@contextlib.contextmanager
def serving(command: list[str], endpoint: Endpoint, log: Path, timeout: float) -> Iterator[None]:
    """Run a server for the length of a ``with`` block.

    Args:
        command: Its command.
        endpoint: Where it will be.
        log: File for what it prints.
        timeout: Seconds until it must be ready.

    Raises:
        ConnectionError: If it ends or is not ready in time; names its last words and ``log``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"},
                preexec_fn=partial(die_with, os.getpid()),  # if this process is killed
            )
        except OSError as error:
            raise ConnectionError(f"{command[0]} cannot be started: {error.strerror}") from error
    try:
        wait_until_ready(process, endpoint, log, timeout)
        yield
    finally:
        stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], endpoint: Endpoint, log: Path, timeout: float) -> None:
    """Return when ``/health`` and ``/v1/models`` answer."""
    end = time.monotonic() + timeout
    while True:
        code = process.poll()
        if code is not None:
            raise ConnectionError(f"the server ended with {code}: {last_words(log)} ({log})")
        try:
            endpoint.models()
            return
        except ConnectionError:
            if time.monotonic() > end:
                raise ConnectionError(f"the server was not ready after {timeout:g} s ({log})") from None
        time.sleep(0.5)


def last_words(log: Path) -> str:
    """The last line of a log that tells of an error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Error:" in line or "error:" in line]
    return (telling or lines or ["it printed nothing"])[-1][-300:]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and what it started, which is one group: politely, then at once."""
    group = process.pid  # it leads a session of its own
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
