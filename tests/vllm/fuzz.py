"""Wrong requests against a server, for minutes: each a 4xx (or a 200 where it is right after all), the server alive, and right
answers in between as they were at the start, alone.

``python tests/vllm/fuzz.py --url http://127.0.0.1:8000 --minutes 10 --seed 0``; exit code 1 if anything was wrong, with the
index of each such request (``--only INDEX`` sends it again). Runs against any server of OpenAI's interface.
"""

import argparse
import http.client
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from fuzz_cases import ANY, REFUSED, Case, body, case, dump, picture, url

KNOWN = 6
RETRY = (429, 503)
"""What a busy server may say to a right request, which is then sent again."""


class Server:
    """A server under test."""

    def __init__(self, address: str, timeout: float) -> None:
        parts = urlsplit(address)
        self.host, self.port, self.timeout = parts.hostname, parts.port or 80, timeout

    def send(self, one: Case, timeout: float | None = None) -> tuple[int, bytes]:
        """Status and body of the answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout or self.timeout)
        try:
            connection.request(one.method, one.path, one.body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except BrokenPipeError:  # refused while the body was on its way
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET."""
        return self.send(Case("get", b"", ANY, path, "GET"))

    def raw(self, data: bytes) -> socket.socket:
        """A connection on which ``data`` was written."""
        connection = socket.create_connection((self.host, self.port), timeout=self.timeout)
        connection.sendall(data)
        return connection

    def model(self) -> str:
        """The name of the served model."""
        return json.loads(self.get("/v1/models")[1])["data"][0]["id"]


def head(length: int) -> bytes:
    """The head of a request with a body of ``length`` bytes."""
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


class Fuzz:
    """One run; failures are lines in ``failures``."""

    def __init__(self, server: Server, *, seed: int, block_size: int) -> None:
        self.server, self.seed, self.block_size = server, seed, block_size
        self.name = server.model()
        self.seen: Counter[tuple[str, int]] = Counter()
        self.failures: list[str] = []
        self.lock = threading.Lock()
        self.known = [(self.question(index), self.solo(index)) for index in range(KNOWN)]

    def question(self, index: int) -> Case:
        """A right request; every second one is streamed, some take drawn tokens."""
        more = {"stream": index % 2 == 1, "vllm_xargs": {"confidence_threshold": 0.9 if index % 3 else 0.3}}
        if index % 3 == 2:
            more |= {"temperature": 0.8, "seed": index}
        return Case("known answer", dump(body(self.name, image=url(picture(index)), **more)), "200")

    def solo(self, index: int) -> str:
        status, data = self.server.send(self.question(index))
        if status != 200:
            raise SystemExit(f"the server does not answer a right request: {status} {data[:300]!r}")
        return text_of(data)

    def fail(self, line: str) -> None:
        with self.lock:
            self.failures.append(line)
            sys.stderr.write(f"WRONG {line}\n")

    def send(self, index: int) -> None:
        """Send case ``index`` and judge the answer."""
        one = case(index, seed=self.seed, model=self.name, block_size=self.block_size)
        try:
            status, data = self.server.send(one)
        except OSError as error:
            reset = isinstance(error, (ConnectionResetError, http.client.RemoteDisconnected)) and len(one.body) > 10**6
            status, data = (413, b"{}") if reset else (0, repr(error).encode())
        except http.client.HTTPException as error:
            status, data = 0, repr(error).encode()
        with self.lock:
            self.seen[one.kind, status] += 1
        good = 400 <= status < 500 or (one.expected == ANY and status == 200)
        if not good:
            self.fail(
                f"case {index} ({one.kind}): {status}, expected {one.expected}: {data[:300]!r} to {one.body[:300]!r}"
            )
        elif status == 400 and one.kind in ("settings", "unsupported"):
            self.judge_error(index, one, data)

    def judge_error(self, index: int, one: Case, data: bytes) -> None:
        """An error has OpenAI's shape, and one line."""
        try:
            message = json.loads(data)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            self.fail(f"case {index} ({one.kind}): not an error of OpenAI's: {data[:300]!r}")
            return
        if not isinstance(message, str) or not message or len(message) > 20_000:
            self.fail(f"case {index} ({one.kind}): message of {len(message)} characters")

    def ask_known(self, index: int) -> None:
        """A right request has the answer that it had alone."""
        one, expected = self.known[index % KNOWN]
        for _ in range(100):
            try:
                status, data = self.server.send(one)
            except (OSError, http.client.HTTPException) as error:
                status, data = 0, repr(error).encode()
            if status not in RETRY:
                break
            time.sleep(0.2)
        with self.lock:
            self.seen["known answer", status] += 1
        if status != 200:
            self.fail(f"known answer {index % KNOWN}: {status} {data[:300]!r}")
        elif text_of(data) != expected:
            self.fail(f"known answer {index % KNOWN}: {text_of(data)!r} instead of {expected!r}")

    def vanish(self, index: int) -> None:
        """Clients that go: before the body's end, right behind it, or in the middle of the answer."""
        source = random.Random(f"{self.seed}:vanish:{index}")
        data = dump(body(self.name, image=url(picture(index)), stream=True, max_tokens=200))
        sent = head(len(data)) + data[: source.choice([0, len(data) // 2, len(data), len(data)])]
        connection = self.server.raw(sent)
        if source.random() < 0.5 and len(sent) > len(data):
            connection.settimeout(2)
            try:
                connection.recv(source.choice([1, 400]))
            except OSError:
                self.seen["stalled", 0] += 1
        connection.close()
        self.seen["vanished", 0] += 1

    def crowd(self, connections: int = 500) -> None:
        """Many connections at once, each with half a request; the server goes on answering others."""
        opened = []
        try:
            for _ in range(connections):
                opened.append(self.server.raw(head(100) + b"{"))
            self.ask_known(0)
            if self.server.get("/health")[0] != 200:
                self.fail("no health in a crowd")
            self.seen["crowd", len(opened)] += 1
        except OSError as error:
            self.fail(f"crowd: connection {len(opened)}: {error!r}")
        finally:
            for connection in opened:
                connection.close()

    def burst(self, requests: int = 500) -> None:
        """Many whole requests at once, right and wrong ones."""
        source = random.Random(f"{self.seed}:burst")
        with ThreadPoolExecutor(requests) as pool:
            jobs = [
                pool.submit(self.ask_known, number) if source.random() < 0.1 else pool.submit(self.send_wrong, number)
                for number in range(requests)
            ]
        for job in jobs:
            job.result()

    def send_wrong(self, number: int) -> None:
        one = Case("burst", dump(body(self.name, vllm_xargs={"confidence_threshold": -number})), REFUSED)
        try:
            status, data = self.server.send(one)
        except (OSError, http.client.HTTPException) as error:
            status, data = 0, repr(error).encode()
        with self.lock:
            self.seen["burst", status] += 1
        if not 400 <= status < 500:
            self.fail(f"burst {number}: {status} {data[:200]!r}")

    def round(self, pool: ThreadPoolExecutor, start: int, size: int) -> None:
        """``size`` cases, known answers and vanishing clients among them, at once."""
        jobs = [pool.submit(self.send, index) for index in range(start, start + size)]
        jobs += [pool.submit(self.ask_known, index) for index in range(start, start + size // 5)]
        jobs += [pool.submit(self.vanish, index) for index in range(start, start + size // 10)]
        for job in jobs:
            job.result()
        try:
            status = self.server.get("/health")[0]
        except (OSError, http.client.HTTPException) as error:
            status = repr(error)
        if status != 200:
            self.fail(f"health is {status} behind case {start + size - 1}")


def text_of(data: bytes) -> str:
    """The text of an answer, streamed or not."""
    if not data.startswith(b"data:"):
        return json.loads(data)["choices"][0]["message"]["content"] or ""
    events = [line[5:].strip() for line in data.decode().splitlines() if line.startswith("data:")]
    choices = [choice for event in events if event != "[DONE]" for choice in json.loads(event).get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def main() -> int:
    """Run; 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--block-size", type=int, required=True, help="of the served model")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one answer")
    parser.add_argument("--only", type=int, help="send this case alone")
    args = parser.parse_args()
    fuzz = Fuzz(Server(args.url, args.timeout), seed=args.seed, block_size=args.block_size)
    end, index, size = time.monotonic() + 60 * args.minutes, 0, 5 * args.clients
    if args.only is not None:
        fuzz.send(args.only)
        end = 0.0
    else:
        fuzz.crowd()
        fuzz.burst()
    with ThreadPoolExecutor(args.clients) as pool:
        while time.monotonic() < end and len(fuzz.failures) < 50:
            fuzz.round(pool, index, size)
            index += size
    for number in range(KNOWN):
        fuzz.ask_known(number)
    for (kind, status), count in sorted(fuzz.seen.items()):
        sys.stdout.write(f"{kind:<16}{status:>5}{count:>8}\n")
    sys.stdout.write(f"{index} cases of seed {args.seed}, {len(fuzz.failures)} wrong\n")
    return 1 if fuzz.failures else 0


if __name__ == "__main__":
    sys.exit(main())
