"""Parts of the local server without a model: text with stop strings, addresses, settings, the command."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import sys
import threading
import time

import pytest

from nemo_bard import cli
from nemo_bard.serving.server import fetch as fetching
from nemo_bard.serving.server.settings import ServerSettings
from nemo_bard.serving.server.text import ResponseText


class Bytes:
    """A tokenizer whose ids are bytes; 0 is special."""

    def decode(self, ids, skip_special_tokens):
        return bytes(i for i in ids if i or not skip_special_tokens).decode("utf-8", "replace")


class TestResponseText:
    @pytest.mark.parametrize("size", range(1, 9))
    def test_pieces_make_the_text_whatever_the_blocks(self, size):
        whole = "a\u00e4\u20ac\U0001f600 end"
        ids = [*whole.encode(), 0]
        text = ResponseText(Bytes())
        said = [text.add(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "\ufffd" not in "".join(said)
        assert "".join([*said, text.finish()]) == text.text == whole
        assert text.num_tokens == len(ids)

    @pytest.mark.parametrize("size", range(1, 9))
    @pytest.mark.parametrize("stop", [["STOP"], ["OP", "XX"], ["P", "STOP"], ["S"]])
    def test_a_stop_string_over_blocks_is_never_said(self, size, stop):
        whole = "one SSTO STOP two"
        ids = list(whole.encode())
        text = ResponseText(Bytes(), stop)
        said = ""
        for i in range(0, len(ids), size):
            said += text.add(ids[i : i + size])
            assert said == whole[: len(said)]
            if text.stopped_by:
                break
        said += text.finish()
        places = [(whole.find(one), one) for one in stop if one in whole]
        assert (said, text.stopped_by) == (whole[: min(places)[0]], min(places)[1])
        assert text.num_tokens == min(place + len(one) for place, one in places)

    def test_the_beginning_of_a_stop_string_at_the_end_is_said_at_last(self):
        text = ResponseText(Bytes(), ["STOP"])
        assert text.add(b"one STO") == "one "
        assert text.finish() == "STO"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("192.168.0.1", False),
        ("0.0.0.0", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:127.0.0.1", False),
    ],
)
def test_only_addresses_of_the_whole_internet_are_public(address, public):
    assert fetching.is_public(address) is public


class Files(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(30):
                    self.wfile.write(b"a")
                    time.sleep(0.1)
        elif self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x" * 60)
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[3:] if self.path != "/to/private" else "http://10.0.0.1/")
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 100)

    def log_message(self, *args):
        pass


class TestFetch:
    @pytest.fixture
    def url(self):
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    @pytest.fixture
    def here(self, monkeypatch):
        private = fetching.is_public
        monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1" or private(address))

    @pytest.mark.usefixtures("here")
    def test_a_file_and_one_behind_redirects(self, url):
        assert fetching.fetch(f"{url}/a", max_bytes=100) == b"x" * 100
        assert fetching.fetch(f"{url}/to/to/a", max_bytes=100) == b"x" * 100

    @pytest.mark.usefixtures("here")
    @pytest.mark.parametrize(
        ("path", "words"),
        [
            ("/missing", "status 404"),
            ("/to/private", "10.0.0.1, which is no public address"),
            ("/to/to/to/to/a", "redirects more than 3 times"),
            ("/cut", "40 bytes are missing"),
            ("/slow", "took longer than 0.5 s"),
        ],
    )
    def test_what_cannot_be_had_is_one_line(self, url, path, words):
        started = time.monotonic()
        with pytest.raises(ValueError, match=words) as caught:
            fetching.fetch(url + path, max_bytes=1000, seconds=0.5, name="image 1")
        assert str(caught.value).startswith("image 1: ")
        assert time.monotonic() - started < 3

    @pytest.mark.usefixtures("here")
    def test_a_file_that_is_too_large(self, url):
        with pytest.raises(ValueError, match="more than 99 bytes"):
            fetching.fetch(f"{url}/a", max_bytes=99)

    def test_private_addresses_are_refused_without_a_connection(self, url):
        for address in (url, url.replace("127.0.0.1", "localhost"), "http://[::1]/", "http://169.254.169.254/latest"):
            with pytest.raises(ValueError, match="which is no public address"):
                fetching.fetch(address, max_bytes=10)
        with pytest.raises(ValueError, match="no http or https address"):
            fetching.fetch("file:///etc/passwd", max_bytes=10)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"port": 70000}, "port must be a port, 0 to 65535, got 70000"),
        ({"max_queue": -1}, "max_queue must be an integer >= 0"),
        ({"stall_seconds": float("nan")}, "stall_seconds must be"),
        ({"api_key": ""}, "api_key must be a text"),
    ],
)
def test_wrong_settings_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        ServerSettings(**values)


class TestCommand:
    @pytest.fixture
    def executed(self, monkeypatch):
        found = []
        monkeypatch.setattr("nemo_bard.cli.commands.serve.has_vllm", lambda: True)
        monkeypatch.setattr(os, "execve", lambda *arguments: found.append(arguments))
        return found

    def test_vllm_gets_its_arguments_and_the_key_out_of_sight(self, start, executed, capsys, monkeypatch):
        monkeypatch.setenv("NEMO_BARD_API_KEY", "s3cret")
        cli.main(["serve", str(start), "--port", "8001", "--", "--max-num-seqs", "32", "--served-model-name=other"])
        (program, command, environment) = executed[0]
        assert program == sys.executable
        assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(start)]
        assert command[-3:] == ["--max-num-seqs", "32", "--served-model-name=other"]
        assert command.count("--served-model-name") == 0
        assert command[command.index("--port") + 1] == "8001"
        assert "--allowed-media-domains" in command
        assert environment["VLLM_API_KEY"] == "s3cret"
        printed = capsys.readouterr().err
        assert "vllm.entrypoints.openai.api_server" in printed
        assert "s3cret" not in printed

    @pytest.mark.parametrize(
        ("words", "variable", "domains", "pixels"),
        [
            ([], None, "none.invalid", "16777216"),
            (["--allow-urls", "--max-pixels", "1000"], "77", "*", "1000"),
            (["--", "--allowed-media-domains", "a.example"], "77", "a.example", "77"),
        ],
    )
    def test_vllm_gets_the_limits_of_pictures(
        self, start, executed, capsys, monkeypatch, words, variable, domains, pixels
    ):
        monkeypatch.delenv("VLLM_MAX_IMAGE_PIXELS", raising=False)
        if variable:
            monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", variable)
        cli.main(["serve", str(start), *words])
        (_, command, environment) = executed[0]
        assert command.count("--allowed-media-domains") == 1
        assert command[command.index("--allowed-media-domains") + 1] == domains
        assert environment["VLLM_MAX_IMAGE_PIXELS"] == pixels
        assert f"VLLM_MAX_IMAGE_PIXELS={pixels} " in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("max-images", "3"),
            ("max-tokens", "3"),
            ("max-prompt-tokens", "3"),
            ("max-body", "3"),
            ("stall-seconds", "3"),
            ("grace-seconds", "3"),
            ("device", "cpu"),
        ],
    )
    def test_vllm_does_not_ignore_what_it_lacks(self, start, executed, capsys, name, value):
        assert cli.main(["serve", str(start), f"--{name}", value]) == 2
        assert f"--{name} is of the local server" in capsys.readouterr().err
        assert not executed

    def test_what_only_one_of_the_servers_has_is_refused(self, start, executed, capsys):
        assert cli.main(["serve", str(start), "--max-queue", "3"]) == 2
        assert "--max-queue is of the local server" in capsys.readouterr().err
        assert cli.main(["serve", str(start), "--engine", "local", "--", "--max-num-seqs", "3"]) == 2
        assert "unknown argument '--max-num-seqs'" in capsys.readouterr().err
        assert not executed

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--engine", "vlm"], "--engine must be one of auto, vllm, local, got 'vlm' (did you mean 'vllm'?)"),
            (["--engine", "vllm"], "vLLM is not installed here"),
            (["--port", "x"], "argument --port: invalid int value"),
            (["--port", "99999"], "port must be a port"),
            (["--max-quue", "3"], "unknown argument '--max-quue'"),
        ],
    )
    def test_wrong_words_are_one_line(self, start, words, said, capsys, monkeypatch):
        monkeypatch.setattr("nemo_bard.cli.commands.serve.has_vllm", lambda: False)
        assert cli.main(["serve", str(start), *words]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert said in lines[0]

    def test_missing_packages_and_folders_are_one_line(self, start, capsys, monkeypatch):
        monkeypatch.setattr("nemo_bard.cli.commands.serve.NEEDED", ("no_such_package",))
        assert cli.main(["serve", str(start), "--engine", "local"]) == 2
        assert "needs no_such_package: pip install 'nemo-bard[serve]'" in capsys.readouterr().err
        assert cli.main(["serve", str(start / "nowhere")]) == 2
        assert "nowhere" in capsys.readouterr().err

    def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(self, start, capsys):
        pytest.importorskip("uvicorn", reason="needs nemo-bard[serve]")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert cli.main(["serve", str(start), "--engine", "local", "--port", str(port)]) == 2
        assert f"host 127.0.0.1, port {port} cannot be had" in capsys.readouterr().err
