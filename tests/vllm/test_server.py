"""vLLM's own server with our plugin, over HTTP: ids as ``generate`` alone, wrong requests refused, the engine alive.

Run by this environment's Python; vLLM runs in one of its own (``make test-vllm``).
"""

import base64
import json
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor

import fuzz
import pytest
import served
import videos
from fuzz_cases import PICTURES, REFUSED, UNSUPPORTED, Case, body, bomb, dump, not_json, picture, url

pytestmark = pytest.mark.vllm
COUNT = 12
WRONG_SETTINGS = [
    {"confidence_threshold": "abc"},
    {"confidence_threshold": 2},
    {"confidence_threshold": [0.5]},
    {"confidence_treshold": 0.5},
    {"denoising_steps": 0},
    {"denoising_steps": 2.5},
    {"top_k": -1},
    {"remasking_strategy": "os.system"},
    {"max_post_edit_steps": 2},
    {"seed": "x"},
    {"mask_token_id": 3},
    {"entropy_bound": 1e300},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    served.vllm_python()
    return served.trained_run(tmp_path_factory.mktemp("vllm") / "run")


@pytest.fixture(scope="module", params=["pbm_b8", "pbm_b32"])
def stage(request, run, tmp_path_factory):
    """A server, and what its answers must be."""
    checkpoint = run / request.param / "export"
    log = tmp_path_factory.mktemp("log") / "server.log"
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(served.references, checkpoint, COUNT)  # while the server starts
        clips = pool.submit(served.clip_references, checkpoint, tmp_path_factory.mktemp("clips"))
        with served.serving(served.vllm_python(), checkpoint, log) as url:
            server = fuzz.Server(url, 300)  # clips at once, on a machine that does other things too
            server.clips, server.checkpoint = clips.result(), checkpoint
            yield server, answers.result()


def asked(answer, **more):
    """The body of a question."""
    settings = {"vllm_xargs": served.SETTINGS, "max_tokens": served.MAX_TOKENS, "return_token_ids": True}
    return body("bard", image=answer["url"], text=answer["question"], **settings) | answer["sampling"] | more


def ids_of(server, answer, **more):
    status, data = server.send(Case("", dump(asked(answer, **more)), "200"))
    assert status == 200, data[:500]
    found = json.loads(data)
    return found["choices"][0]["token_ids"], found


def counter(server, name):
    """The sum of a counter of ``/metrics``."""
    lines = server.get("/metrics")[1].decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_ids_are_those_of_generate_whoever_else_asks(stage):
    server, answers = stage
    assert len({tuple(answer["ids"]) for answer in answers}) > COUNT // 2  # an answer of somebody else would be seen
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda answer: ids_of(server, answer)[0], answers))
    assert found == [answer["ids"] for answer in answers]


def test_a_prompt_with_the_mask_token_is_refused(stage):
    """Whether its tokenizer has a name for it or not; the server answers the next request as before."""
    server, answers = stage
    config = json.loads((server.checkpoint / "config.json").read_text())
    for ids in ([config["mask_token_id"]], [5, config["mask_token_id"], 6]):
        request = {"model": asked(answers[0])["model"], "prompt": ids, "max_tokens": 4}
        status, data = server.send(Case("mask", dump(request), REFUSED, path="/v1/completions"))
        assert status == 400, data[:500]
        message = json.loads(data)["error"]["message"]
        assert message.startswith(f"the prompt holds the mask token (id {config['mask_token_id']})"), message
    assert ids_of(server, answers[0])[0] == answers[0]["ids"]


def of_video(answer):
    """The content of a message with a clip."""
    clip = {"type": "video_url", "video_url": {"url": answer["url"]}}
    return [{"role": "user", "content": [clip, {"type": "text", "text": answer["question"]}]}]


def test_a_file_of_a_video_gives_the_ids_of_generate(stage):
    """The same frames at the same times, though another library decodes them here; whoever else asks."""
    server, answers = stage
    asks = [(clip, {"messages": of_video(clip)}) for clip in server.clips] + [(answer, {}) for answer in answers[:3]]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda ask: ids_of(server, ask[0], **ask[1]), asks))
    for number, ((expected, _), (ids, whole)) in enumerate(zip(asks, found, strict=True)):
        assert whole["prompt_token_ids"] == expected["prompt_ids"], number
        assert ids == expected["ids"], number
    assert len({tuple(clip["ids"]) for clip in server.clips}) > len(server.clips) // 2


WRONG_VIDEOS = {
    "no base64": lambda data: "data:video/mp4;base64,!!!",
    "nothing": lambda data: served.data_url("video/mp4", b""),
    "no video": lambda data: served.data_url("video/mp4", b"digits" * 100),
    "cut": lambda data: served.data_url("video/mp4", data[: len(data) // 2]),
    "a picture": lambda data: served.data_url("video/mp4", picture(0)),
    "one frame": lambda data: served.data_url("video/mp4", videos.encoded(1)),
    "a type that is none": lambda data: served.data_url("video/jpeg", data),
    "a file of the server": lambda data: "file:///etc/passwd",
    "an address that does not answer": lambda data: "http://127.0.0.1:9/a.mp4",
}


def test_wrong_videos_are_refused_in_one_line(stage):
    server, answers = stage
    clip = server.clips[0]
    data = base64.b64decode(clip["url"].partition(",")[2])
    for name, make in WRONG_VIDEOS.items():
        status, found = server.send(
            Case("video", dump(asked(clip, messages=of_video({**clip, "url": make(data)}))), REFUSED)
        )
        assert 400 <= status < 500, (name, status, found[:500])
        message = json.loads(found)["error"]["message"]
        assert message, name
        assert "\n" not in message, (name, message)
    two = of_video(clip)
    two[0]["content"] *= 2
    assert server.send(Case("video", dump(asked(clip, messages=two)), REFUSED))[0] == 400
    assert ids_of(server, clip, messages=of_video(clip))[0] == clip["ids"]


def test_ids_from_the_prefix_cache(stage):
    server, answers = stage
    before = counter(server, "vllm:prefix_cache_hits_total")
    for answer in [answers[0], answers[6], answers[0], answers[6]]:
        ids, found = ids_of(server, answer)
        assert ids == answer["ids"]
        assert found["usage"]["completion_tokens"] == len(ids)
    assert counter(server, "vllm:prefix_cache_hits_total") > before


def test_a_refused_request_spoils_no_picture(stage):
    """The next right request with a picture that came with a wrong one first."""
    server, _ = stage
    for seed, wrong in enumerate([{"vllm_xargs": {"top_k": -1}}, {"stop_token_ids": [10**9]}, {"logprobs": True}]):
        right = body("bard", image=url(picture(1000 + seed)))
        assert server.send(Case("", dump(right | wrong), REFUSED))[0] == 400
        assert server.send(Case("", dump(right), "200"))[0] == 200


def test_addresses_are_not_fetched_and_large_pictures_not_decoded(stage):
    server, _ = stage
    for image, said in (("http://localhost/a.png", "fetches no addresses"), (url(bomb(4097, 4097)), "16777216 pixels")):
        status, data = server.send(Case("", dump(body("bard", image=image)), REFUSED))
        assert (status, said in json.loads(data)["error"]["message"]) == (400, True), data[:300]


def test_a_stream_has_the_same_text(stage):
    server, answers = stage
    status, data = server.send(Case("", dump(asked(answers[1], stream=True)), "200"))
    assert (status, fuzz.text_of(data)) == (200, answers[1]["text"])


def test_a_seed_draws_the_same_again(stage):
    server, answers = stage
    drawn = [ids_of(server, answers[0], temperature=1.0, seed=seed)[0] for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(ids) for ids in drawn}) > 1


def test_the_openai_client(stage):
    """One call of OpenAI's own client, which is in the environment of vLLM."""
    server, answers = stage
    code = (
        "import json, sys, openai\n"
        "address, request = json.load(sys.stdin)\n"
        "client = openai.OpenAI(base_url=address, api_key='none', max_retries=0)\n"
        "extra = {name: request.pop(name) for name in ('vllm_xargs', 'return_token_ids')}\n"
        "print(client.chat.completions.create(**request, extra_body=extra).choices[0].message.content)\n"
    )
    given = json.dumps([f"http://{server.host}:{server.port}/v1", asked(answers[2])])
    done = subprocess.run([served.vllm_python(), "-c", code], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answers[2]["text"].strip()


def test_wrong_requests_are_refused_and_the_engine_lives(stage):
    server, answers = stage
    source = random.Random(0)
    wrong = [Case("settings", dump(asked(answers[0], vllm_xargs=given)), REFUSED) for given in WRONG_SETTINGS]
    wrong += [Case("unsupported", dump(asked(answers[0]) | given), REFUSED) for given in UNSUPPORTED]
    for medium, expected in PICTURES:
        if expected == REFUSED:
            found = medium(source) if callable(medium) else medium
            wrong.append(Case("picture", dump(body("bard", image=found)), REFUSED))
    wrong += [not_json("bard", source, 8) for _ in range(12)]
    wrong.append(Case("large", dump(body("bard", text="digits " * 1_400_000)), REFUSED))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(server.send, wrong))
    for one, (status, data) in zip(wrong, found, strict=True):
        assert 400 <= status < 500, (one.kind, one.body[:300], status, data[:300])
        if one.kind != "not JSON":  # of these some are answered by vLLM's web framework
            assert json.loads(data).get("error", {}).get("message"), (one.kind, one.body[:300], data[:300])
    assert server.get("/health")[0] == 200
    assert ids_of(server, answers[3])[0] == answers[3]["ids"]


def test_a_wrong_setting_is_named_in_one_line(stage):
    server, answers = stage
    _, data = server.send(Case("", dump(asked(answers[0], vllm_xargs={"confidence_treshold": 0.5})), REFUSED))
    error = json.loads(data)["error"]
    assert error["message"].startswith(
        "unknown setting vllm_xargs.confidence_treshold; did you mean confidence_threshold?"
    )
    assert error["type"] in ("invalid_request_error", "BadRequestError")


def test_clients_that_vanish_or_stall_disturb_nobody(stage):
    server, answers = stage
    data = dump(asked(answers[0], stream=True, max_tokens=200))
    halves = [server.raw(fuzz.head(len(data)) + data[: len(data) // 2]) for _ in range(20)]
    whole = [server.raw(fuzz.head(len(data)) + data) for _ in range(10)]
    for connection in whole:
        connection.close()
    assert ids_of(server, answers[5])[0] == answers[5]["ids"]
    for connection in halves:
        connection.close()
    assert server.get("/health")[0] == 200
