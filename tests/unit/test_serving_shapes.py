"""Bodies over which vLLM stumbles are refused in one line that names the place."""

import asyncio
import re
from types import SimpleNamespace

import pytest

from nemo_bard.serving.requests import BadRequest
from nemo_bard.serving.vllm.shapes import check_shapes

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def said(*content, **more):
    return {"model": "bard", "messages": [{"role": "user", "content": list(content)}], **more}


@pytest.mark.parametrize(
    ("body", "key", "line"),
    [
        (said({"type": None, "text": "a"}), "messages", "messages[0].content[0]: type must be a text"),
        (said({"text": "a"}, {"type": 7}), "messages", "messages[0].content[1]: type must be a text"),
        (said([]), "messages", "messages[0].content[0] must be an object with 'type', got []"),
        (said({"type": "input_audio", "input_audio": "x"}), "messages", "input_audio is not supported"),
        (said({"audio_url": 3}), "messages", "audio_url is not supported, the model hears nothing"),
        (
            said(PICTURE, truncate_prompt_tokens=7),
            "truncate_prompt_tokens",
            "must be left out where there are pictures",
        ),
        (said("a", structured_outputs=7), "structured_outputs", "structured_outputs is not supported, got 7"),
        (said("a", stop="\ud83d"), "stop", "stop holds '\\ud83d', which is no character"),
        (said("a", kv_transfer_params={"a": ["\udc00"]}), "kv_transfer_params", "which is no character"),
        ({"\ud83d": 1}, "\\ud83d", "\\ud83d holds '\\ud83d', which is no character"),
    ],
)
def test_a_shape_is_refused_in_one_line(body, key, line):
    with pytest.raises(BadRequest, match=re.escape(line)) as caught:
        check_shapes(body)
    assert "\n" not in str(caught.value)
    assert caught.value.param == key
    str(caught.value).encode()


@pytest.mark.parametrize(
    "body",
    [
        said(PICTURE, {"type": "text", "text": "a"}, stop=["\U0001f600"], structured_outputs=None),
        said("a", {"text": "a"}, truncate_prompt_tokens=7),
        {"messages": "hello", "prompt": [1, 2]},
        {"messages": [{"role": "user", "content": None}, 7]},
        [],
        None,
        "text",
    ],
)
def test_all_else_is_left_to_vllm(body):
    check_shapes(body)


def test_every_route_of_a_bard_server_is_checked_and_of_no_other(monkeypatch):
    fastapi = pytest.importorskip("fastapi", reason="needs nemo-bard[serve]")
    import sys

    from nemo_bard.upstream import vllm as room

    router = fastapi.APIRouter()

    @router.post("/ask")
    async def ask(request: dict):
        return request

    @router.get("/health")
    async def health():
        return "well"

    def register_api_routers(args, app, supported_tasks, model_config=None):
        app.include_router(router)

    module = SimpleNamespace(register_api_routers=register_api_routers)
    monkeypatch.setitem(sys.modules, room._APP, module)

    def refuse(body):
        if "bad" in body:
            raise fastapi.HTTPException(400, "bad")

    room.add_body_check(refuse, lambda config: config == "bard")
    first = module.register_api_routers
    room.add_body_check(refuse, lambda config: config == "bard")
    assert module.register_api_routers is first
    for name, expected in (("bard", 400), ("other", 200), (None, 200)):
        app = fastapi.FastAPI()
        module.register_api_routers(None, app, (), name)
        assert call(app, "POST", "/ask", b'{"bad": 1}') == expected
        assert call(app, "POST", "/ask", b'{"good": 1}') == 200
        assert call(app, "POST", "/ask", b"{") == 422
        assert call(app, "GET", "/health", b"") == 200


def call(app, method, path, body):
    """The status of an answer of an ASGI application."""
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http"}
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"]
