"""The local server over HTTP: answers as ``model.generate`` gives them, limits, wrong requests, clients that go or stall."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from local_server import Paced, ask, data_url, events, picture, request, send_raw, serving

pytest.importorskip("fastapi", reason="needs nemo-bard[serve]")
pytest.importorskip("uvicorn", reason="needs nemo-bard[serve]")
pytest.importorskip("prometheus_client", reason="needs nemo-bard[serve]")


@pytest.fixture(scope="module")
def loaded(start):
    from nemo_bard.evaluation.responder import load_checkpoint

    return load_checkpoint(start, device="cpu")


@pytest.fixture(scope="module")
def paced(loaded):
    return Paced(loaded[0])


@pytest.fixture(scope="module")
def port(paced, loaded):
    with serving(paced, loaded[1], max_queue=64, max_pixels=40_000, max_tokens=256, stall_seconds=1.0) as found:
        yield found


@pytest.fixture
def slow(paced):
    paced.seconds = 0.05
    yield paced
    paced.seconds = 0.0


def solo(loaded, text, *images, seed=None, **settings):
    """What ``model.generate`` answers."""
    from nemo_bard.data.encode import encode_prompts

    model, processor = loaded
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    batch = encode_prompts(processor, [[{"role": "user", "content": parts}]])
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    ids = model.generate(batch, **{"max_new_tokens": 12, **settings}, generator=generator)
    return processor.tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)


def content_of(answer):
    return answer["choices"][0]["message"]["content"]


def metric(port, name):
    lines = request(port, None, path="/metrics", method="GET")[2].decode().splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), 0.0)


def until(wanted, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestAnswers:
    def test_concurrent_answers_are_those_of_generate(self, port, loaded):
        cases = [
            ("Read the digits.", [picture(1)], {}),
            ("Which colour?", [picture(2), picture(3, (96, 64))], {"denoising_steps": 2}),
            ("one two three", [], {"remasking_strategy": "low_confidence_static", "denoising_steps": 3}),
            ("left or right", [picture(4)], {"temperature": 1.0, "top_k": 9, "seed": 7}),
            ("many words here", [], {"remasking_strategy": "entropy_bound", "entropy_bound": 3.0}),
            ("and again", [picture(5)], {"edit_threshold": 0.1, "max_post_edit_steps": 2}),
        ] * 3
        expected = [solo(loaded, text, *images, **settings) for text, images, settings in cases]
        assert len(set(expected)) == 6

        def one(case):
            text, images, settings = case
            stream = len(text) % 2 == 0
            status, _, answer = request(port, ask(text, *images, stream=stream, **settings))
            assert status == 200
            if not stream:
                return content_of(answer)
            return "".join(event["choices"][0]["delta"].get("content", "") for event in events(answer))

        with ThreadPoolExecutor(len(cases)) as pool:
            assert list(pool.map(one, cases)) == expected

    def test_settings_in_vllm_xargs_are_those_at_the_top(self, port):
        answers = {
            content_of(request(port, ask("one two", temperature=0.9, **place))[2])
            for place in ({"vllm_xargs": {"denoising_steps": 2, "seed": 3}}, {"denoising_steps": 2, "seed": 3})
        }
        assert len(answers) == 1

    def test_several_turns_and_a_system_turn(self, port, loaded):
        from nemo_bard.data.encode import encode_prompts

        turns = [("system", "no words"), ("user", "left"), ("assistant", "right"), ("user", "top")]
        messages = [{"role": role, "content": text} for role, text in turns]
        batch = encode_prompts(loaded[1], [messages])
        ids = loaded[0].generate(batch, max_new_tokens=12)
        expected = loaded[1].tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)
        answer = request(port, {"model": "tiny", "messages": messages, "max_tokens": 12})[2]
        assert content_of(answer) == expected
        assert answer["usage"]["prompt_tokens"] == batch["input_ids"].shape[1]

    def test_usage_and_reason_count_the_response_alone(self, port):
        answer = request(port, ask("one two three"))[2]
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (12, "length")
        assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 12

    def test_a_stop_string_ends_the_answer_before_it(self, port):
        whole = request(port, ask("one two three", max_tokens=64))[2]
        text = content_of(whole)
        stop = text[len(text) // 3 :][:3]
        for stream in (False, True):
            status, _, cut = request(
                port,
                ask("one two three", max_tokens=64, stop=[stop], stream=stream, stream_options={"include_usage": True}),
            )
            assert status == 200
            pieces = events(cut) if stream else None
            usage = pieces[-1]["usage"] if pieces else cut["usage"]
            choices = [event["choices"][0] for event in pieces if event["choices"]] if pieces else cut["choices"]
            said = "".join(one["delta"].get("content", "") for one in choices) if pieces else content_of(cut)
            assert said == text[: text.index(stop)]
            assert choices[-1]["finish_reason"] == "stop"
            assert 0 < usage["completion_tokens"] < 64

    def test_a_stream_has_a_chunk_per_block_and_drafts_only_when_asked(self, port):
        plain = events(request(port, ask("one two three", stream=True))[2])
        drafts = events(request(port, ask("one two three", stream=True, bard_drafts=True, max_tokens=7))[2])
        blocks = [event for event in plain if event["choices"][0]["delta"].get("content")]
        assert 1 <= len(blocks) <= 3
        assert not any("bard" in event for event in plain)
        steps = [event["bard"]["step"] for event in drafts if "step" in event.get("bard", {})]
        numbers = next(event["bard"]["numbers"] for event in drafts if "numbers" in event.get("bard", {}))
        assert len(steps) == numbers["denoising_forwards"]
        assert [step["block"] for step in steps] == sorted(step["block"] for step in steps)
        assert {len(step["cells"]) for step in steps} == {4}
        assert all(state != "draft" for _, state, _ in steps[-1]["cells"])
        assert any(state == "draft" for step in steps for _, state, _ in step["cells"])

    def test_openai_client(self, port, loaded):
        openai = pytest.importorskip("openai", reason="needs the openai client")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
        arguments = ask("Read the digits.", picture(1))
        extra = {"bard_drafts": True, "denoising_steps": 4}
        chunks = client.chat.completions.create(**arguments, stream=True, extra_body=extra)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == solo(loaded, "Read the digits.", picture(1), denoising_steps=4)
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.BadRequestError, match="confidence_threshold must be in"):
            client.chat.completions.create(**arguments, extra_body={"confidence_threshold": 2})


def image_part(url):
    return {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}


def bomb():
    """A PNG file of 144 million pixels in 140 kB, and its head alone says so."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 12000, 12000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(12000 * 1501), 9)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


WRONG = {
    "unknown setting": (400, ask("a", confidence_treshold=0.5), "confidence_threshold"),
    "out of range": (400, ask("a", vllm_xargs={"confidence_threshold": 2}), "confidence_threshold must be"),
    "dotted strategy": (400, ask("a", remasking_strategy="os.system"), "remasking_strategy must be one of"),
    "engine": (400, ask("a", decode_path="plain"), "decode_path is the server's"),
    "logprobs": (400, ask("a", logprobs=True), "logprobs is not supported"),
    "response_format": (400, ask("a", response_format={"type": "json_object"}), "response_format is not supported"),
    "n": (400, ask("a", n=2), "n must be 1"),
    "n while drawing": (400, ask("a", n=2, temperature=1), "n must be 1"),
    "too many tokens": (400, ask("a", max_tokens=257), "max_tokens must be at most 256"),
    "huge number": (400, ask("a", seed=10**30), "seed must be an integer of 64 bits"),
    "model": (404, {**ask("a"), "model": "gpt"}, "this server has 'tiny'"),
    "no JSON": (400, b"{", "not JSON"),
    "deep JSON": (400, b"[" * 100_000, "not JSON"),
    "NaN": (400, b'{"temperature": NaN}', "NaN is not JSON"),
    "no UTF-8": (400, b'{"a": "\xff"}', "not JSON"),
    "a list": (400, b"[]", "must be a JSON object"),
    "no messages": (400, {"model": "tiny"}, "messages must be a list"),
    "last is the assistant": (
        400,
        {"model": "tiny", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "the last message must be the user's",
    ),
    "empty": (400, ask(" "), "the last message is empty"),
    "markup": (400, ask("<|im_end|>"), "chat template reserves"),
    "tool role": (400, {"messages": [{"role": "tool", "content": "a"}]}, "role must be one of"),
    "video": (400, {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "text or image_url"),
    "a file": (400, image_part({"url": "/etc/passwd"}), "must be a data: URL"),
    "a file URL": (400, image_part({"url": "file:///etc/passwd"}), "must be a data: URL"),
    "an address": (400, image_part("http://127.0.0.1/"), "--allow-urls"),
    "bad base64": (400, image_part({"url": "data:image/png;base64,@@"}), "not base64"),
    "no image": (400, image_part({"url": "data:image/png;base64,AAAA"}), "image 1 cannot be read"),
    "a bomb": (400, image_part({"url": bomb()}), "pixels"),
    "too many pixels": (400, ask("a", picture(0, (150, 150)), picture(1, (150, 150))), "--max-pixels"),
    "long text": (400, ask("a" * 1_100_000), "--max-prompt-tokens"),
    "many tokens": (400, ask("one " * 20_000), "--max-prompt-tokens"),
    "drafts": (400, ask("a", bard_drafts=1), "bard_drafts must be true or false"),
}


class TestWrongRequests:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("case", WRONG)
    def test_each_gets_one_line(self, port, case, stream):
        status, body, words = WRONG[case]
        if isinstance(body, dict):
            body = {**body, "stream": stream}
        got, _, answer = request(port, body)
        message = answer["error"]["message"]
        assert (got, set(answer["error"])) == (status, {"message", "type", "param", "code"})
        assert words in message
        assert "\n" not in message
        assert len(message) < 600

    def test_others_get_right_answers_in_between(self, port, loaded):
        right = solo(loaded, "one two three", picture(1))
        jobs = [
            ask("one two three", picture(1)) if i % 3 == 0 else body for i, (_, body, _) in enumerate(WRONG.values())
        ]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda body: request(port, body), jobs))
        good = [content_of(answer) for status, _, answer in answers if status == 200]
        assert good == [right] * len(jobs[::3])

    def test_unknown_paths_and_methods(self, port):
        assert request(port, None, path="/nowhere", method="GET")[0] == 404
        assert request(port, None, method="GET")[0] == 405
        assert request(port, ask("a"), headers={"Content-Type": "text/plain"})[0] == 415


class TestLimits:
    def test_a_full_line_is_429_and_what_waits_is_answered(self, loaded):
        model = Paced(loaded[0])
        model.gate.clear()
        with serving(model, loaded[1], max_queue=2) as port, ThreadPoolExecutor(8) as pool:
            first = [pool.submit(request, port, ask("one")) for _ in range(3)]
            until(lambda: metric(port, "nemo_bard_requests_waiting") == 2)
            status, headers, answer = request(port, ask("one"))
            assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
            assert int(headers["retry-after"]) >= 1
            assert request(port, None, path="/health", method="GET")[0] == 200
            model.gate.set()
            assert [one.result()[0] for one in first] == [200] * 3
            assert request(port, ask("one"))[0] == 200

    def test_a_large_body_is_413_before_it_is_read_and_while_it_is(self, loaded):
        with serving(*loaded, max_body=1000) as port:
            with send_raw(port, b"{", length=2000) as sock:
                assert sock.recv(12) == b"HTTP/1.1 413"
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                sock.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"3e8\r\n" + b"a" * 1000 + b"\r\n")
                sock.sendall(b"1\r\na\r\n")
                assert sock.recv(12) == b"HTTP/1.1 413"

    def test_the_key_is_needed_for_the_interface_alone(self, loaded):
        with serving(*loaded, api_key="s3cret") as port:
            for path in ("/v1/models", "/v1/bard"):
                assert request(port, None, path=path, method="GET")[0] == 401
                key = {"Authorization": "Bearer s3cret"}
                assert request(port, None, path=path, method="GET", headers=key)[0] == 200
            status, headers, answer = request(port, ask("a"), headers={"Authorization": "Bearer s3cre\xe9"})
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
            assert request(port, ask("a"), headers={"Authorization": "bearer s3cret"})[0] == 200
            for path in ("/", "/health", "/metrics"):
                assert request(port, None, path=path, method="GET")[0] == 200


class TestClientsThatGo:
    def test_a_client_that_goes_frees_the_thread_between_steps(self, port, slow):
        before, gone = slow.steps, metric(port, 'nemo_bard_requests_total{status="499"}')
        body = json.dumps(ask("one", stream=True, max_tokens=256, denoising_steps=4)).encode()
        sock = send_raw(port, body)
        until(lambda: slow.steps > before + 1)
        sock.close()
        until(lambda: metric(port, "nemo_bard_requests_running") == 0)
        assert slow.steps - before < 40
        until(lambda: metric(port, 'nemo_bard_requests_total{status="499"}') == gone + 1)

    def test_a_client_that_goes_while_it_waits_is_never_decoded(self, port, paced):
        paced.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(request, port, ask("one"))
            until(lambda: metric(port, "nemo_bard_requests_running") == 1)
            sock = send_raw(port, json.dumps(ask("two")).encode())
            until(lambda: metric(port, "nemo_bard_requests_waiting") == 1)
            sock.close()
            forwards = metric(port, "nemo_bard_forwards_total")
            paced.gate.set()
            assert first.result()[0] == 200
            until(lambda: metric(port, "nemo_bard_requests_waiting") == 0)
        assert metric(port, "nemo_bard_forwards_total") - forwards < 20

    def test_a_client_that_sends_nothing_more_gets_408(self, port):
        with send_raw(port, b'{"model"', length=100) as sock:
            assert sock.recv(12) == b"HTTP/1.1 408"

    def test_a_client_that_reads_nothing_is_left(self, loaded):
        from nemo_bard.serving.server.app import make_app
        from nemo_bard.serving.server.settings import ServerSettings

        app = make_app(*loaded, "tiny", ServerSettings(stall_seconds=0.2))
        body = json.dumps(ask("one two three", stream=True)).encode()
        sent, messages = [], [{"type": "http.request", "body": body}]

        async def receive():
            return messages.pop() if messages else await asyncio.sleep(60)

        async def send(message):
            sent.append(message["type"])
            if len(sent) == 2:
                await asyncio.sleep(60)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": ""}
        scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http"}
        asyncio.run(asyncio.wait_for(app({**scope, "server": ("x", 80)}, receive, send), 20))
        assert sent == ["http.response.start", "http.response.body"]
        assert app.state.thread.admitted == 0
        app.state.thread.close()

    def test_five_hundred_connections_and_a_living_server(self, port, loaded):
        stalled = [send_raw(port, b"{", length=50) for _ in range(250)]
        idle = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(200)]
        try:
            with ThreadPoolExecutor(50) as pool:
                answers = list(pool.map(lambda i: request(port, ask("one two three", picture(1))), range(50)))
            right = solo(loaded, "one two three", picture(1))
            assert {content_of(answer) for status, _, answer in answers if status == 200} == {right}
            assert {status for status, _, _ in answers} <= {200, 429}
        finally:
            for sock in (*stalled, *idle):
                sock.close()
        assert request(port, ask("one"))[0] == 200


def test_a_failure_of_the_model_is_a_500_and_the_next_answer_is_right(loaded):
    class Failing(Paced):
        fails = True

        def generate(self, batch, **arguments):
            if self.fails:
                raise RuntimeError("out of memory")
            return super().generate(batch, **arguments)

    model = Failing(loaded[0])
    with serving(model, loaded[1]) as port:
        for stream in (False, True):
            status, _, answer = request(port, ask("one", stream=stream))
            assert (status, answer["error"]["type"]) == (500, "server_error")
            assert "out of memory" in answer["error"]["message"]
        model.fails = False
        assert content_of(request(port, ask("one"))[2]) == solo(loaded, "one")


def test_stopping_the_server_ends_a_running_request(loaded):
    model = Paced(loaded[0])
    model.seconds = 0.05
    with ThreadPoolExecutor(1) as pool:
        with serving(model, loaded[1]) as port:
            running = pool.submit(request, port, ask("one", max_tokens=1024, denoising_steps=4))
            until(lambda: model.steps > 1)
        assert model.steps < 200
        status, _, answer = running.result()
        assert (status, answer["error"]["message"]) == (503, "the server is stopping")


def test_data_urls_are_those_of_the_pictures():
    assert data_url(picture(1)) != data_url(picture(2))
