"""A local server on a free port for tests, and a client of the standard library."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time

import torch
from PIL import Image


def picture(seed=0, size=(64, 64)):
    pixels = torch.randint(0, 255, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask(text, *images, **more):
    content = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content.append({"type": "text", "text": text})
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12, **more}


class Paced:
    """A model whose steps wait: for a gate, or some seconds each."""

    def __init__(self, model):
        self.model, self.seconds, self.steps = model, 0.0, 0
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, batch, *, streamer, **arguments):
        put_step = streamer.put_step

        def paced(record):
            self.steps += 1
            self.gate.wait(30)
            time.sleep(self.seconds)
            put_step(record)

        streamer.put_step = paced
        return self.model.generate(batch, streamer=streamer, **arguments)


@contextlib.contextmanager
def serving(model, processor, **settings):
    """Serve under the name ``tiny``; yields the port."""
    import uvicorn

    from nemo_bard.serving.server.app import make_app
    from nemo_bard.serving.server.run import bind
    from nemo_bard.serving.server.settings import ServerSettings

    app = make_app(model, processor, "tiny", ServerSettings(**settings))
    with bind("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def request(port, body, *, path="/v1/chat/completions", method="POST", headers=None):
    """Status, headers, and the parsed or raw body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(method, path, raw, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        content = response.read()
        kind = response.getheader("content-type", "")
        return response.status, dict(response.getheaders()), json.loads(content) if "json" in kind else content
    finally:
        connection.close()


def events(content):
    """The events of a streamed answer, without the last one."""
    lines = [line[6:] for line in content.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def send_raw(port, body, *, length=None):
    """A connection of which the answer is not read yet."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    sock.sendall(head.encode() + body)
    return sock
