"""``benchmarks/serve.py`` against a server that is none: its counts, times and comparisons are exact."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serve

    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    return serve


class Pretender:
    """Answers the text of a question in pieces; remembers what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.usage = True
        self.pause = 0.0
        self.fails = lambda number: None
        """Status and message of the request with this number, or None."""
        self.ending = lambda number: ""
        """What is said behind the answer of this request."""

    def answer(self, body: dict) -> tuple[list[str], int]:
        question = body["messages"][-1]["content"][-1]["text"]
        return [f"to {question}", " more\u2028", "end"], 7


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def tell(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/v1/models":
            self.tell(200, {"data": [{"id": "one"}, {"id": "other"}]})
        elif self.path == "/metrics":
            steps = 2 * len(self.server.pretender.bodies)
            text = f'# HELP a b\nvllm:diffusion_num_denoising_steps_total{{engine="0"}} {steps}.0\nother 5\n'.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
        elif self.path == "/version":
            self.tell(200, {"version": "9.9"})
        else:
            self.tell(404, {})

    def do_POST(self):
        at: Pretender = self.server.pretender
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with at.lock:
            number = len(at.bodies)
            at.bodies.append(body)
            at.keys.append(self.headers.get("Authorization"))
            at.running += 1
            at.most = max(at.most, at.running)
        try:
            if failed := at.fails(number):
                self.tell(failed[0], {"error": {"message": failed[1]}})
            else:
                self.stream(at, body, number)
        finally:
            with at.lock:
                at.running -= 1

    def stream(self, at: Pretender, body: dict, number: int) -> None:
        pieces, tokens = at.answer(body)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        events += [{"choices": [{"delta": {"content": piece}}]} for piece in [*pieces, at.ending(number)]]
        events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        if at.usage:
            events.append({"choices": [], "usage": {"prompt_tokens": 1000, "completion_tokens": tokens}})
        for event in events:
            time.sleep(at.pause)
            self.wfile.write(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def pretender():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.pretender = Pretender()
    server.pretender.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.pretender
    server.shutdown()
    thread.join()
    server.server_close()


def run(serve, pretender, tmp_path, *arguments: str) -> tuple[int, dict]:
    output = tmp_path / "out" / "serve.json"
    code = serve.main(["--url", pretender.url, "--output", str(output), *arguments])
    return code, json.loads(output.read_text())


def test_counts_and_requests(serve, pretender, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--api-key=secret"])
    flags = ("--samples", "3", "--clients", "4", "--per-client", "2", "--api-key", "secret", "--max-tokens", "9")
    pretender.pause = 0.01
    code, found = run(serve, pretender, tmp_path, *flags, "--xargs", '{"denoising_steps": 4}')
    assert code == 0
    one, four = found["rows"]
    assert (one["clients"], one["requests"], one["tokens"]) == (1, 3, 21)
    assert (four["clients"], four["requests"], four["tokens"]) == (4, 8, 56)
    assert four["tokens_per_second"] == pytest.approx(56 / four["wall_s"])
    for row in found["rows"]:
        assert row["solo_equal"] == row["solo_compared"] == row["requests"]
        assert row["errors"] == 0
        assert row["pieces"] == 3
        assert row["tpf"] == 7 / 2
        assert 10 < row["between_p50_ms"] < row["first_p50_ms"] < row["latency_p50_ms"] <= row["latency_p99_ms"]
    assert pretender.most == 4
    assert len(pretender.bodies) == 1 + 3 + 4 + 8, "the warm-up is asked, and not counted"
    assert set(pretender.keys) == {"Bearer secret"}
    body = pretender.bodies[0]
    assert body["vllm_xargs"] == {"denoising_steps": 4}
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("one", 9, 0)
    assert "seed" not in body
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["type"] == "text"
    assert "secret" not in json.dumps(found), "nor is it in the command"
    assert found["versions_served"] == {"server": "9.9"}
    assert (tmp_path / "out/serve.png").stat().st_size > 5000


def test_unequal_answers_are_found(serve, pretender, tmp_path):
    flags = ("--samples", "4", "--clients", "2", "--warm-up", "0")
    pretender.ending = lambda number: " changed" if number in (4, 6) else ""
    code, found = run(serve, pretender, tmp_path, *flags, "--exact")
    assert code == 1
    one, two = found["rows"]
    assert (one["solo_equal"], one["solo_compared"]) == (4, 4)
    assert (two["solo_equal"], two["solo_compared"]) == (2, 4)
    shown = two["solo_unequal"][0]
    assert shown["got"][0] == shown["wanted"][0] + " changed"


def test_errors_count_and_compare_nothing(serve, pretender, tmp_path):
    flags = ("--samples", "4", "--clients", "2", "--warm-up", "0")
    pretender.fails = lambda number: (429, "too many") if number in (0, 5) else None
    code, found = run(serve, pretender, tmp_path, *flags)
    assert code == 1
    one, two = found["rows"]
    assert (one["errors"], one["tokens"], one["solo_compared"]) == (1, 21, 3)
    assert one["first_error"] == "HTTP 429: too many"
    assert (two["errors"], two["tokens"]) == (1, 21)
    assert two["solo_compared"] in (2, 3)  # the first prompt has no solo answer


def test_reference(serve, pretender, tmp_path, capsys):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    assert serve.main(["--write-prompts", str(prompts), "--samples", "3"]) == 0
    questions = [json.loads(line)["messages"][0]["content"][-1]["text"] for line in prompts.read_text().splitlines()]
    texts = [f"to {question} more\u2028end" for question in questions]
    lines = [{"id": number, "text": text} for number, text in enumerate([*texts[:2], "another"])]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--prompts", str(prompts), "--reference", str(answers), "--clients", "1", "--warm-up", "0")
    code, found = run(serve, pretender, tmp_path, *flags)
    assert code == 0, "without --exact they are only told"
    row = found["rows"][0]
    assert (row["reference_equal"], row["reference_compared"]) == (2, 3)
    assert row["reference_unequal"] == [{"prompt": 2, "wanted": "another", "got": texts[2]}]
    answers.write_text(json.dumps(lines[0]) + "\n")
    assert serve.main(["--url", pretender.url, *flags]) == 2
    assert capsys.readouterr().err == f"error: {answers} has no answer to the prompt with id 1\n"


def test_a_server_that_fails_is_one_line(serve, pretender, tmp_path, capsys):
    flags = ("--samples", "2", "--clients", "1", "--warm-up", "0")
    pretender.fails = lambda _: (500, "boom\nand more")
    code, found = run(serve, pretender, tmp_path, *flags)
    assert code == 1
    told = "ConnectionError: all 2 requests failed, the first with HTTP 500: boom and more"
    assert found["rows"][0]["failed"] == told
    assert capsys.readouterr().err.count("\n") == 1
    pretender.fails, pretender.usage = (lambda _: None), False
    assert "give --tokenizer DIR" in run(serve, pretender, tmp_path, *flags)[1]["rows"][0]["failed"]
    capsys.readouterr()
    pretender.url = "http://127.0.0.1:1"
    code, found = run(serve, pretender, tmp_path, *flags)
    assert code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("failed: server: http://127.0.0.1:1/v1/models: ConnectError")


def test_wrong_model_and_options(serve, pretender, tmp_path, capsys):
    assert (
        serve.main(["--url", pretender.url, "--model", "othr", "--samples", "1", "--output", str(tmp_path / "a")]) == 2
    )
    assert capsys.readouterr().err == "error: --model must be one of one, other, got 'othr' (did you mean 'other'?)\n"
    for flags, words in (
        ([], "give either --url or --start"),
        (["--url", "http://x", "--rival", "."], "--rival goes with --start"),
        (["--url", "http://x", "--clients", "0"], "must be an integer >= 1, got '0'"),
        (["--url", "http://x", "--reference", "a"], "--reference goes with --prompts"),
        (["--start", str(tmp_path)], "is no checkpoint"),
    ):
        with pytest.raises(SystemExit):
            serve.main(flags)
        assert words in capsys.readouterr().err


def test_percentiles(serve):
    import _clients

    good = [
        _clients.Answer(n, start=0, end=n + 1, arrivals=[0.5, 0.5 + n / 100], text="a", tokens=5) for n in range(101)
    ]
    bad = _clients.Answer(101, start=-1, end=0, error="x")
    row = _clients.figures([*good, bad], lambda answer: answer.tokens)
    assert row["wall_s"] == 102
    assert row["tokens_per_second"] == 505 / 102
    assert (row["latency_p50_ms"], row["latency_p99_ms"]) == (51000, 100000)
    assert (row["between_p50_ms"], row["between_p99_ms"]) == (pytest.approx(500), pytest.approx(990))
    assert (row["first_p50_ms"], row["first_p99_ms"]) == (500, 500)
    assert (row["requests"], row["errors"], row["first_error"]) == (102, 1, "x")


SERVER = """
import http.server, json, os, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({pids!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"data": [{{"id": "one"}}], "version": "1"}}).encode())
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_started_servers_end(serve, tmp_path):
    """A server of a script: ready when it answers, gone with its child afterwards."""
    import _servers
    from _clients import Endpoint

    script, pids = tmp_path / "server.py", tmp_path / "pids"
    script.write_text(SERVER.format(pids=str(pids)))
    port = _servers.free_port()
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1/", None, 5)
    command = [sys.executable, str(script), *_servers.server_command("python", tmp_path, port, [])[1:]]
    with contextlib.suppress(KeyError), _servers.serving(command, endpoint, tmp_path / "log", 30):
        assert endpoint.models() == ["one"]
        running = [int(word) for word in pids.read_text().split()]
        assert all(map(alive, running))
        raise KeyError
    time.sleep(0.1)
    assert not any(map(alive, running))
    bad = [sys.executable, "-c", "print('starting'); raise SystemExit('ValueError: no room')"]
    ends = _servers.serving(bad, Endpoint("http://127.0.0.1:1", None, 5), tmp_path / "bad", 30)
    with pytest.raises(ConnectionError, match="the server ended with 1: ValueError: no room"):
        ends.__enter__()
    given = _servers.server_command("python", tmp_path, port, ["--enable-prefix-caching", "--mm-processor-cache-gb=1"])
    assert not {"--no-enable-prefix-caching", "--mm-processor-cache-gb"} & set(given)
