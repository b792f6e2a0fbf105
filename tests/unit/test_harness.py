"""lmms-eval's words and messages, and the command that runs it; nothing here needs lmms-eval."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from nemo_bard.base.errors import RunError
from nemo_bard.cli.app import main
from nemo_bard.evaluation.harness.arguments import cut, read_generation_kwargs, read_model_args
from nemo_bard.evaluation.harness.command import PUBLISHED, Plan, build_command, check_results, find_results
from nemo_bard.evaluation.harness.messages import read_messages, user_turn


# ------------------ words ------------------
def test_model_args_are_the_adapters_settings_and_those_of_decoding():
    settings, decoding = read_model_args(
        {
            "pretrained": 2024,
            "batch_size": "4",
            "device": "none",
            "fps": 2,
            "denoising_steps": 3.0,
            "eos_token_id": -1.0,
        }
    )
    assert (settings.pretrained, settings.batch_size, settings.device, settings.fps) == ("2024", 4, None, 2)
    assert decoding == {"denoising_steps": 3, "eos_token_id": -1}
    assert read_model_args({"pretrained": "x", "eos_token_id": "[7,8]"})[1] == {"eos_token_id": [7, 8]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "pretrained must be given"),
        ({"pretrained": "x", "batchsize": 4}, "unknown model argument 'batchsize'; did you mean 'batch_size'?"),
        ({"pretrained": "x", "batch_size": "auto"}, "batch_size must be an integer >= 1, got 'auto'"),
        ({"pretrained": "x", "confidence_treshold": 0.5}, "did you mean 'confidence_threshold'?"),
        ({"pretrained": "x", "dtype": "float61"}, "dtype must be one of .*did you mean 'float16'"),
        ({"pretrained": "x", "loglikelihood": "exakt"}, "did you mean 'exact'"),
        ({"pretrained": "x", "fps": 0}, "fps must be a finite number > 0"),
        ({"pretrained": "x", "min_pixels": 9, "max_pixels": 8}, "min_pixels 9 must be at most max_pixels, 8"),
        ({"pretrained": "x", "return_step_stats": True}, "unknown model argument"),
    ],
)
def test_wrong_model_args_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        read_model_args(values)


def test_generation_kwargs_of_tasks():
    plain = {"max_new_tokens": 16, "temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False, "until": "\n\n"}
    found = read_generation_kwargs(plain)
    assert found.decoding == {"max_new_tokens": 16, "temperature": 0.0}
    assert (found.until, found.unused) == (("\n\n",), ())
    assert read_generation_kwargs({"temperature": 0.7, "top_p": 0.9}).decoding == {"temperature": 0.7, "top_p": 0.9}
    assert read_generation_kwargs({"do_sample": True, "temperature": None}).decoding == {"temperature": 1.0}
    assert read_generation_kwargs({"until": ["a", ""], "denoising_steps": 2}).decoding == {"denoising_steps": 2}
    told = read_generation_kwargs({"do_sample": False, "temperature": 0.5, "num_beams": 5, "seed": 1})
    assert told.decoding == {"temperature": 0.0}
    assert told.unused == ("num_beams=5", "seed=1", "temperature=0.5 (do_sample is false)")
    with pytest.raises(ValueError, match="until must be a text or a list of them, got 7"):
        read_generation_kwargs({"until": 7})


def test_an_answer_ends_before_the_first_stop():
    assert cut("one\n\ntwo END", ("END", "\n\n")) == "one"
    assert cut("one", ("END",)) == "one"
    assert cut("END", ("END",)) == ""


# ------------------ messages ------------------
def test_messages_become_a_conversation_with_images_and_videos(tmp_path):
    Image.new("L", (40, 30), 7).save(file := tmp_path / "a.png")
    (clip := tmp_path / "a.mp4").write_bytes(b"x")
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    turns = user_turn([clear, str(file), str(clip), {"path": str(clip)}], "what?")
    found = read_messages([{"role": "system", "content": "old"}, *turns], system_prompt="new")
    assert found[0] == {"role": "system", "content": [{"type": "text", "text": "new"}]}
    one, two, three, four, text = found[1]["content"]
    assert one["image"].getpixel((0, 0)) == (255, 255, 255)
    assert (two["image"].mode, two["image"].size) == ("RGB", (40, 30))
    assert three == four == {"type": "video", "video": str(clip)}
    assert text == {"type": "text", "text": "what?"}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio", "url": "a.wav"}, "a text, an image or a video, got 'audio'"),
        ({"type": "image", "url": "https://example.org/a.png"}, "image must be a local file"),
        ({"type": "image", "url": "/nowhere/a.png"}, "/nowhere/a.png"),
        ({"type": "video", "url": "/nowhere/a.mp4"}, "video file /nowhere/a.mp4 does not exist"),
        ({"type": "video", "url": {"url": "a.mp4", "video_start": 1.0}}, "video_start is set"),
        ({"type": "image", "url": Image.new("F", (8, 8))}, "pixels of mode F"),
    ],
)
def test_media_that_cannot_be_used_are_named(part, message):
    with pytest.raises(ValueError, match=message):
        read_messages([{"role": "user", "content": [part]}])


def test_unknown_roles_are_refused():
    with pytest.raises(ValueError, match="role must be one of system, user, assistant, got 'tool'"):
        read_messages([{"role": "tool", "content": "x"}])


# ------------------ the command ------------------
def after(command, option):
    return command[command.index(option) + 1]


def test_settings_that_tasks_have_too_go_where_they_win():
    decoding = {"max_new_tokens": 64, "temperature": 0.5, "denoising_steps": 2, "eos_token_id": [7, 8]}
    command = build_command(
        Plan(
            model="m",
            tasks=["mme", "ai2d"],
            output=Path("out"),
            batch_size=3,
            limit=5,
            decoding=decoding,
            extra=["--x"],
        )
    )
    assert command[1:5] == ["-m", "lmms_eval", "--model", "bard_vl"]
    assert after(command, "--model_args") == "pretrained=m,dtype=auto,denoising_steps=2,eos_token_id=[7,8]"
    assert after(command, "--gen_kwargs") == "max_new_tokens=64,temperature=0.5,do_sample=True"
    assert (after(command, "--tasks"), after(command, "--limit"), after(command, "--batch_size")) == (
        "mme,ai2d",
        "5",
        "3",
    )
    assert command[-1] == "--x"


def test_a_folder_that_lmms_eval_would_split_is_refused():
    with pytest.raises(ValueError, match=r"pretrained 'a,b' cannot be written as an argument of lmms-eval"):
        build_command(Plan(model="a,b", tasks=["mme"], output=Path("out")))


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        names = ("digits",)

        def do_GET(self):
            body = json.dumps({"data": [{"id": name} for name in Handler.names]}).encode()
            self.send_response(200 if self.path == "/v1/models" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", Handler
    httpd.shutdown()
    httpd.server_close()


def test_a_server_is_asked_for_its_models_name(server, monkeypatch):
    url, handler = server
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    command = build_command(Plan(model=None, tasks=["mme"], output=Path("out"), server=url, batch_size=16))
    assert after(command, "--model") == "async_openai"
    assert after(command, "--model_args") == f"base_url={url}/v1,model=digits,num_cpus=16,api_key=none"
    assert "--log_samples" in command
    handler.names = ("a", "b")
    with pytest.raises(ValueError, match=r"has 2 models \(a, b\); name one with --model"):
        build_command(Plan(model=None, tasks=["mme"], output=Path("out"), server=f"{url}/v1"))
    with pytest.raises(ValueError, match="denoising_steps cannot be sent by lmms-eval's client"):
        build_command(Plan(model="a", tasks=["mme"], output=Path("out"), server=url, decoding={"denoising_steps": 2}))


def test_a_run_without_results_is_no_success(tmp_path):
    with pytest.raises(RunError, match="ended without results"):
        check_results(tmp_path, find_results(tmp_path), 0)
    (folder := tmp_path / "m").mkdir()
    (folder / "1_results.json").write_text("{}")
    before = find_results(tmp_path)
    with pytest.raises(RunError, match="ended without results"):
        check_results(tmp_path, before, 0)
    (folder / "2_results.json").write_text("{}")
    assert check_results(tmp_path, before, 0) == folder / "2_results.json"
    (folder / "2_samples_mme.jsonl").write_text('{"resps": ["[LMMS_EVAL_REQUEST_FAILED after 5 retries] x"]}\n')
    with pytest.raises(RunError, match="2_samples_mme.jsonl: the server did not answer some requests"):
        check_results(tmp_path, before, 0)


# ------------------ nemo-bard eval ------------------
def test_a_dry_run_prints_the_command_for_the_published_benchmarks(start, capsys):
    assert main(["eval", "--model", str(start), "--device", "cpu", "--dry-run", "--", "--include_path", "x"]) == 0
    out = capsys.readouterr().out
    assert (
        f"--model bard_vl --model_args pretrained={start},dtype=auto,device=cpu --tasks {','.join(PUBLISHED)} " in out
    )
    assert out.endswith("--include_path x\n")
    assert len(PUBLISHED) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model DIR or --server URL must be given"),
        (["--model", "MODEL", "stray"], "unknown argument 'stray'; arguments of lmms-eval go behind --"),
        (["--model", "MODEL", "--tasks", ","], "--tasks names no task"),
        (["--model", "MODEL", "--top-p", "2"], "top_p must be in (0, 1], got 2.0"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--server", "localhost:8000"], "--server must be an address such as http://localhost:8000"),
        (["--server", "http://localhost:1", "--dtype", "float32"], "--dtype is the server's own"),
        (["--server", "http://localhost:1"], "does not list its models"),
    ],
)
def test_wrong_words_end_as_one_line(words, message, start, capsys):
    assert main(["eval", *[str(start) if word == "MODEL" else word for word in words]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_lmms_eval_names_the_command_that_installs_it(start, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *args: None if name == "lmms_eval" else find(name, *args)
    )
    assert main(["eval", "--model", str(start), "--tasks", "mme"]) == 2
    assert "pip install --no-deps -r constraints-lmms.txt" in capsys.readouterr().err
