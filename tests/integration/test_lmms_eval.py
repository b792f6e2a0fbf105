"""lmms-eval itself on tasks with local images: answers, rounds, likelihoods, and a server. ``make test-lmms``."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from lmms_tasks import read_run, write_tasks
from PIL import Image

pytestmark = [
    pytest.mark.lmms,
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None,
        reason="needs lmms-eval: pip install --no-deps -r constraints-lmms.txt",
    ),
]
ENTRY_POINT = "[lmms_eval.models]\nbard_vl = nemo_bard.evaluation.harness:manifest\n"
SAMPLES = 6


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), SAMPLES)


@pytest.fixture(scope="module")
def site(tmp_path_factory, install_package):
    """A folder for ``PYTHONPATH`` with the entry point, which an older installation of this package may lack."""
    return install_package(tmp_path_factory.mktemp("site"), "bard-entry-point", {}, ENTRY_POINT)


@pytest.fixture(scope="module")
def responder(start):
    from nemo_bard.evaluation.responder import BlockDiffusionResponder, load_checkpoint

    model, processor = load_checkpoint(start, device="cpu")
    return BlockDiffusionResponder(model, processor, model.generation_config.updated(max_new_tokens=24))


@pytest.fixture(scope="module")
def samples(tasks):
    import datasets

    return list(datasets.Dataset.from_parquet(str(tasks / "digits.parquet")))


@pytest.fixture(scope="module")
def nemo_bard_eval(tasks, site, tmp_path_factory):
    """``nemo-bard eval`` in a process of its own; returns it, and the folder of its results."""

    def run(*words, extra=()):
        output = tmp_path_factory.mktemp("run")
        path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", os.getcwd())])
        home = str(tasks / "home")  # of the cache that datasets keeps
        environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": home, "OPENAI_API_KEY": "x"}
        command = [sys.executable, "-m", "nemo_bard.cli", "eval", *words, "--output", str(output)]
        command += ["--", "--include_path", str(tasks), "--log_samples", *extra]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False), output

    return run


@pytest.fixture(scope="module")
def read_and_rounds(nemo_bard_eval, start):
    done, output = nemo_bard_eval(
        "--model", str(start), "--device", "cpu", "--tasks", "digits_read,digits_rounds", "--batch-size", "4"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, *read_run(output)


def turns(*texts, image):
    """A question with an image, and what was said after it."""
    first = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": texts[0]}]}
    roles = ("assistant", "user")
    later = [{"role": roles[i % 2], "content": [{"type": "text", "text": t}]} for i, t in enumerate(texts[1:])]
    return [first, *later]


def test_answers_are_those_of_generate_one_by_one(read_and_rounds, responder, samples):
    _, results, found = read_and_rounds
    expected = [responder.answer([turns(s["question"], image=s["image"])]).answers[0] for s in samples]
    assert len({answer.text for answer in expected}) > 1  # else equality would say little
    assert [line["filtered_resps"] for line in found["digits_read"]] == [answer.text for answer in expected]
    assert [line["token_counts"][0]["output_tokens"] for line in found["digits_read"]] == [
        answer.num_tokens for answer in expected
    ]
    right = sum(answer.text.strip() == s["answer"] for answer, s in zip(expected, samples, strict=True))
    assert results["results"]["digits_read"]["right,none"] == right / SAMPLES


def test_the_throughput_table_has_tokens_per_forward(read_and_rounds):
    out, results, _ = read_and_rounds
    speed = results["throughput"]
    assert 0 < speed["avg_tokens_per_forward"] <= speed["avg_tokens_per_denoising_forward"]
    assert speed["avg_speed"] == pytest.approx(speed["total_gen_tokens"] / speed["total_elapsed_time"])
    assert "|avg_tokens_per_forward " in out
    assert "-m lmms_eval --model bard_vl" in out.splitlines()[0]


def test_rounds_see_what_was_answered_before(read_and_rounds, responder, samples):
    _, _, found = read_and_rounds
    for sample, line in zip(samples, found["digits_rounds"], strict=True):
        said = [sample["question"]]
        for answer in line["filtered_resps"]:
            assert responder.answer([turns(*said, image=sample["image"])]).answers[0].text == answer
            said += [answer, sample["question"]]
        assert len(said) >= 3


@pytest.fixture(scope="module")
def evaluate(tasks, site):
    """``simple_evaluate`` of lmms-eval in this process: results of a task."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(site))
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tasks / "home" / "datasets")
    from lmms_eval import evaluator  # pyright: ignore[reportMissingImports]
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager("ERROR", include_path=str(tasks), model_name="bard_vl")

    def run(task, model_args, **kwargs):
        results = evaluator.simple_evaluate(
            "bard_vl", model_args=model_args, tasks=[task], task_manager=manager, device="cpu", **kwargs
        )
        return sorted(results["samples"][task], key=lambda line: line["doc_id"]), results

    yield run
    patch.undo()


def test_batches_of_one_and_of_four_answer_alike(evaluate, read_and_rounds, start):
    alone, _ = evaluate("digits_read", f"pretrained={start}", batch_size="1")
    together = [[line["filtered_resps"]] for line in read_and_rounds[2]["digits_read"]]
    assert [line["filtered_resps"] for line in alone] == together


def test_two_processes_share_the_samples(tasks, site, start, tmp_path):
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", os.getcwd())])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "lmms_eval",
    ]
    command += ["--model", "bard_vl", "--model_args", f"pretrained={start},device=cpu", "--tasks", "digits_read"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path), "--log_samples"]
    environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(tasks / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    _, found = read_run(tmp_path)
    assert [line["doc_id"] for line in found["digits_read"]] == list(range(SAMPLES)), done.stdout + done.stderr


def test_choices_are_made_by_likelihood(evaluate, responder, samples, start):
    from nemo_bard.data.encode import encode_prompts
    from nemo_bard.evaluation.likelihood import response_likelihood

    found, results = evaluate(
        "digits_choice", f"pretrained={start},likelihood_draws=20,likelihood_seed=3", force_simple=True
    )
    right = 0
    for sample, line in zip(samples, found, strict=True):
        inputs = encode_prompts(responder.processor, [turns(sample["question"], image=sample["image"])])
        values = []
        for choice in sample["choices"]:
            ids = responder.processor.tokenizer(choice, add_special_tokens=False)["input_ids"]
            values.append(response_likelihood(responder.model, inputs, torch.tensor(ids), draws=20, seed=3).log_prob)
        assert [-float(pair[0]) for pair in line["filtered_resps"]] == pytest.approx(values)
        right += max(range(4), key=values.__getitem__) == sample["target"]
    assert results["results"]["digits_choice"]["acc,none"] == right / SAMPLES


# ------------------ a server ------------------
@pytest.fixture
def server(responder):
    """A server that answers as OpenAI's do, or with an error: ``server.status``."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {"data": [{"id": "digits"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if httpd.status != 200:
                self.reply(httpd.status, {"error": {"message": "no"}})
                return
            image, text = body["messages"][0]["content"]
            data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            with lock:
                answer = responder.answer([turns(text["text"], image=picture)]).answers[0]
            httpd.asked.append((body["model"], body["temperature"], body["max_tokens"]))
            message = {"role": "assistant", "content": answer.text}
            self.reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "digits",
                             "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})  # fmt: skip

        def reply(self, status, value):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.status, httpd.asked = 200, []
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def test_a_server_is_evaluated_alike_and_its_failures_are_no_answers(server, nemo_bard_eval, read_and_rounds):
    words = ("--server", f"http://127.0.0.1:{server.server_port}", "--tasks", "digits_read", "--batch-size", "4")
    done, output = nemo_bard_eval(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    _, found = read_run(output)
    assert [line["filtered_resps"] for line in found["digits_read"]] == [
        line["filtered_resps"] for line in read_and_rounds[2]["digits_read"]
    ]
    assert server.asked == [("digits", 0, 24)] * SAMPLES
    server.status = 400
    done, _ = nemo_bard_eval(*words, "--limit", "2")
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "the server did not answer some requests" in done.stderr.splitlines()[-1]


def test_a_task_that_is_not_there_is_no_success(nemo_bard_eval, start):
    done, _ = nemo_bard_eval("--model", str(start), "--tasks", "digits_raed", "--device", "cpu")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: lmms-eval ended without results")
