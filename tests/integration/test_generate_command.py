"""``nemo-bard generate``, ``evaluate`` and ``calibrate`` on a tiny checkpoint with random weights, in one process."""

import json
import re
import sys
import threading

import pytest
from PIL import Image

from nemo_bard.cli import options
from nemo_bard.cli.app import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3-VL folder ``source``, ``bard`` made from it, two images and a video."""
    from nemo_bard.checkpoints.convert import convert
    from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

    base = tmp_path_factory.mktemp("generate")
    text = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    vision = {"out_hidden_size": 64}
    make_tiny_qwen3_vl(base / "source", text=text, vision=vision)
    convert(base / "source", base / "bard", block_size=4)
    for number, size in enumerate([(64, 64), (96, 64)]):
        Image.linear_gradient("L").resize(size).convert("RGB").save(base / f"{number}.png")
    return base


@pytest.fixture
def call(folder, capsys):
    """Runs a command on the model; returns exit code, stdout and stderr."""

    def run(command, *words, model="bard"):
        capsys.readouterr()
        code = main([command, "--model", str(folder / model), *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def refused(result):
    """The one line of a refusal."""
    code, out, err = result
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_every_setting_is_a_flag():
    from nemo_bard import BardGenerationConfig

    returned = {"return_dict_in_generate", "return_step_stats", "output_history"}
    assert {*options.decoding_fields(), *returned} == set(BardGenerationConfig.known_keys())


def test_one_prompt(call, folder, tmp_path):
    words = ("--image", folder / "0.png", "--image", folder / "1.png", "--prompt", "Read.", "--max-new-tokens", 10)
    code, plain, err = call("generate", *words, "--stats", "--visualize", tmp_path / "v.html")
    assert code == 0
    tokens = int(re.search(r"^(\d+) tokens in (\d+) denoising", err, re.M)[1])
    assert 1 <= tokens <= 10
    assert f"{tokens} tokens in" in (tmp_path / "v.html").read_text()
    code, streamed, _ = call("generate", *words, "--stream")
    assert (code, streamed) == (0, plain)
    assert call("generate", *words, "--decode-path", "plain")[1] == plain
    assert call("generate", *words, "--max-new-tokens", 1)[1] != plain


def test_settings_reach_the_decoder(call, folder, monkeypatch):
    from nemo_bard import BardVLForConditionalGeneration

    seen = {}
    real = BardVLForConditionalGeneration.generate

    def spy(self, inputs, *, generation_config, streamer):
        seen.update(generation_config.to_dict())
        return real(self, inputs, generation_config=generation_config, streamer=streamer)

    monkeypatch.setattr(BardVLForConditionalGeneration, "generate", spy)
    flags = {
        "--block-size": 2, "--denoising-steps": 1, "--remasking-strategy": "low_confidence_static",
        "--temperature": 0.5, "--top-k": 3, "--top-p": 0.9, "--eos-token-id": "5,6", "--max-new-tokens": 3,
    }  # fmt: skip
    words = [word for pair in flags.items() for word in pair]
    assert call("generate", "--prompt", "Read.", *words, "--no-suppress-mask-token")[0] == 0
    for flag, value in flags.items():
        expected = [5, 6] if flag == "--eos-token-id" else value
        assert seen[flag[2:].replace("-", "_")] == expected
    assert seen["suppress_mask_token"] is False


def test_seed_fixes_the_draw(call):
    words = ("--prompt", "Read.", "--max-new-tokens", 16, "--temperature", 1)
    first = call("generate", *words, "--seed", 1)[1]
    assert call("generate", *words, "--seed", 1)[1] == first
    assert call("generate", *words, "--seed", 2)[1] != first


@pytest.fixture
def prompts(folder):
    """Five prompts: with and without image, system turn and id; the last two as training lines."""
    lines = [
        {"prompt": "Read.", "images": ["0.png"], "id": "first"},
        {"prompt": "Which is <image> of these?", "images": ["1.png"], "system": "Answer short."},
        {"prompt": "No image."},
        {"messages": [{"role": "user", "content": "<image>Read."}, {"role": "assistant", "content": "7"}],
         "images": ["0.png"]},
        {"messages": [{"role": "user", "content": "Say it."}]},
    ]  # fmt: skip
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_batch_equals_single_prompts_and_resumes(call, folder, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    words = ("--batch", prompts, "--output", out, "--max-new-tokens", 6, "--batch-size", 2)
    assert call("generate", *words)[0] == 0
    whole = out.read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["id"] for record in records] == ["first", 2, 3, 4, 5]
    for record in records:
        assert {"id", "text", "num_tokens", "tpf", "key"} == record.keys()
        assert 1 <= record["num_tokens"] <= 6
        assert record["tpf"] > 0
    single = call("generate", "--prompt", "Read.", "--image", folder / "0.png", "--max-new-tokens", 6)[1]
    assert single == records[0]["text"] + "\n"
    assert records[3]["text"] == records[0]["text"]  # the same prompt in another batch, its reference left out

    starts = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
    for cut in (starts[1], starts[3] + 7, len(whole) - 1):  # between lines, inside a line, before the last line break
        out.write_bytes(whole[:cut])
        code, _, err = call("generate", *words)
        assert code == 0
        assert out.read_bytes() == whole
        assert f"{sum(start <= cut for start in starts) - 1} of 5 lines were finished" in err
    code, printed, _ = call("generate", *words)
    assert (code, "all 5 lines" in printed) == (0, True)


def test_batch_keeps_what_it_did_not_write(call, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    words = ("--batch", prompts, "--output", out, "--max-new-tokens", 3)
    out.write_text("my notes\n")
    assert "out.jsonl:1" in refused(call("generate", *words))
    assert out.read_text() == "my notes\n"
    assert call("generate", *words, "--overwrite")[0] == 0
    whole = out.read_text()
    assert "setting" in refused(call("generate", *words[:-1], 4))
    lines = prompts.read_text().splitlines(keepends=True)
    prompts.write_text("".join(lines[:3]))
    assert "more lines than there are prompts (3)" in refused(call("generate", *words))
    prompts.write_text("".join([lines[0], '{"prompt": "Another."}\n', *lines[2:]]))
    assert "out.jsonl:2" in refused(call("generate", *words))
    assert out.read_text() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object, got list"),
        (b"{}", "either 'prompt' or 'messages'"),
        (b'{"prompt": 1}', "'prompt' must be a text, got 1"),
        (b'{"prompt": ""}', "the prompt is empty"),
        (b'{"prompt": "a", "images": ["none.png"]}', "none.png does not exist"),
        (b'{"prompt": "a <image>"}', "1 image placeholders"),
        (b'{"prompt": "a", "id": "x"}', "id 'x' is also that of line 1"),
        (b'{"prompt": "a", "id": [1]}', "'id' must be"),
        (b'{"prompt": "<|im_end|>"}', "<|im_end|>"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "must be a user's"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_wrong_prompt_lines_are_named(call, folder, tmp_path, line, message):
    path = folder / "wrong.jsonl"
    path.write_bytes(b'{"prompt": "fine", "id": "x"}\n' + line + b"\n")
    error = refused(call("generate", "--batch", path, "--output", tmp_path / "o.jsonl"))
    assert "wrong.jsonl:2: " in error
    assert message in error
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--prompt TEXT or --batch FILE"),
        (("--prompt", "a", "--batch", "b"), "--prompt TEXT or --batch FILE"),
        (("--batch", __file__), "--output"),
        (("--batch", __file__, "--output", "c", "--image", "d"), "--image goes with --prompt only"),
        (("--batch", __file__, "--output", __file__), "is the file of the prompts"),
        (("--batch", __file__, "--output", "c", "--root-dir", "none"), "none is not a folder"),
        (("--prompt", "a", "--block-size", "four"), "--block-size: invalid int value: 'four'"),
        (("--prompt", "a", "--top-p"), "--top-p: expected one argument"),
        (("--batch", "none.jsonl", "--output", "c"), "none.jsonl does not exist"),
        (("--prompt", "a", "--output", "c"), "--output goes with --batch only"),
        (("--prompt", "a", "--image", "none.png"), "none.png does not exist"),
        (("--prompt", "a", "--image", __file__), "cannot be read"),
        (("--prompt", "a", "--video", "none.mp4"), "none.mp4"),
        (("--prompt", "a", "--block-size", "0"), "block_size must be an integer >= 1, got 0"),
        (("--prompt", "a", "--remasking-strategy", "x"), "low_confidence_static"),
        (("--prompt", "a", "--max-post-edit-steps", "1"), "edit_threshold"),
        (("--prompt", "a", "--device", "tpu"), "'tpu'"),
        (("--prompt", "a", "--device", "cuda:99"), "cuda:99"),
        (("--prompt", "a", "--dtype", "int8"), "float32"),
        (("--prompt", "a", "--visualize", "a.mp4"), ".html"),
        (("--prompt", "a", "--visualize", "none/a.gif"), "does not exist"),
    ],
)
def test_wrong_words_are_refused_before_the_model_is_loaded(call, monkeypatch, words, message):
    from nemo_bard.evaluation import responder

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(responder, "load_checkpoint", load)
    assert message in refused(call("generate", *words))


def test_wrong_model_folders(call, folder, tmp_path):
    assert "does not exist" in refused(call("generate", "--prompt", "a", model="none"))
    assert "config.json" in refused(call("generate", "--prompt", "a", model="."))
    assert "nemo-bard convert" in refused(call("generate", "--prompt", "a", model="source"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama'" in refused(call("generate", "--prompt", "a", model=tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not a JSON file" in refused(call("generate", "--prompt", "a", model=tmp_path))
    (tmp_path / "config.json").write_text((folder / "bard" / "config.json").read_text())
    assert "not complete" in refused(call("generate", "--prompt", "a", model=tmp_path))


def test_existing_picture_is_kept(call, tmp_path):
    (tmp_path / "v.gif").write_text("mine")
    assert "--overwrite" in refused(call("generate", "--prompt", "a", "--visualize", tmp_path / "v.gif"))
    assert (tmp_path / "v.gif").read_text() == "mine"
    words = ("--prompt", "a", "--max-new-tokens", 2, "--visualize", tmp_path / "v.gif", "--overwrite")
    assert call("generate", *words)[0] == 0
    with Image.open(tmp_path / "v.gif") as image:
        assert image.n_frames >= 2


def test_video(call, folder, write_clip):
    write_clip(folder / "v.mp4")
    code, out, _ = call("generate", "--video", folder / "v.mp4", "--prompt", "What?", "--max-new-tokens", 4)
    assert code == 0
    assert out.strip()
    (folder / "broken.mp4").write_bytes(b"no video")
    assert "broken.mp4" in refused(call("generate", "--video", folder / "broken.mp4", "--prompt", "What?"))


def test_without_a_video_decoder_the_error_says_what_to_install(call, folder, monkeypatch):
    from nemo_bard.data import video

    (folder / "any.mp4").write_bytes(b"")
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    assert "pip install" in refused(call("generate", "--video", folder / "any.mp4", "--prompt", "What?"))


def test_evaluate_both_kinds_of_model(call, tmp_path):
    words = ("--data", "digits:test,rows=1,columns=2", "--limit", 3, "--batch-size", 2, "--max-new-tokens", 6)
    code, out, _ = call("evaluate", *words, "--output", tmp_path / "r.json")
    assert code == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["scores"]) == ["exact_match", "digit_accuracy"]
    assert f"response tokens     {result['num_tokens']}" in out
    for sample in result["samples"]:
        assert sample["tpf"] == sample["num_tokens"] / sample["denoising_forwards"]
        assert re.fullmatch(r"\d\d", sample["reference"])
    assert "--overwrite" in refused(call("evaluate", *words, "--output", tmp_path / "r.json"))
    code, out, _ = call("evaluate", *words, model="source")
    assert code == 0
    assert re.search(r"tokens per forward  1\.00", out)
    assert "'digit'" in refused(call("evaluate", "--data", "digits:digit", model="source"))


def test_autoregressive_answers_do_not_depend_on_the_batch(folder):
    from nemo_bard.data.digits import make_digits
    from nemo_bard.evaluation.responder import AutoregressiveResponder, load_checkpoint

    model, processor = load_checkpoint(folder / "source")
    prompts = [make_digits("test", 2)[i]["conversation"][:1] for i in range(2)]
    prompts.append([{"role": "user", "content": [{"type": "text", "text": "Read."}]}])
    responder = AutoregressiveResponder(model, processor, 5)
    together = responder.answer(prompts).answers
    assert together == [responder.answer([prompt]).answers[0] for prompt in prompts]


def test_calibrate(call, folder, tmp_path):
    words = ("--data", "digits:test,rows=1,columns=2", "--limit", 2, "--max-new-tokens", 4, "--repeats", 1)
    words += ("--thresholds", "0.5", "--steps", "1,4", "--scorer", "accuracy", "--tolerance", "100")
    out = tmp_path / "sweep"
    before = sorted((file.name, file.read_bytes()) for file in (folder / "bard").glob("*.json"))
    code, printed, _ = call("calibrate", *words, "--output", out)
    assert code == 0
    assert printed.count("\n* ") == 1
    table = json.loads((out / "calibration.json").read_text())
    assert len(table["points"]) == 4
    assert table["metric"] == "accuracy"
    assert sorted((file.name, file.read_bytes()) for file in (folder / "bard").glob("*.json")) == before
    assert "--overwrite" in refused(call("calibrate", *words, "--output", out))
    assert "model folder" in refused(call("calibrate", *words, "--output", folder / "bard"))
    assert "nemo-bard convert" in refused(call("calibrate", *words, model="source"))


def test_calibrate_asks_for_matplotlib_before_the_sweep(call, monkeypatch):
    from nemo_bard.cli.commands import calibrate

    monkeypatch.setattr(calibrate, "find_spec", lambda name: None)
    assert "pip install matplotlib" in refused(call("calibrate", "--data", "digits:test"))


def test_transformers_streamers_and_pipeline(folder):
    from transformers import TextIteratorStreamer, pipeline

    from nemo_bard.data.encode import encode_prompts
    from nemo_bard.evaluation.responder import load_checkpoint

    model, processor = load_checkpoint(folder / "bard")
    conversation = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (64, 64))}]}]
    batch = encode_prompts(processor, [conversation])
    expected = processor.tokenizer.decode(model.generate(batch, max_new_tokens=8)[0], skip_special_tokens=True)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    arguments = {**batch, "max_new_tokens": 8, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    assert "".join(streamer) == expected
    thread.join()
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    found = pipe(text=conversation, max_new_tokens=8, return_full_text=False)
    assert found[0]["generated_text"] == expected


def test_terminal_gets_drafts(folder, monkeypatch):
    from nemo_bard.cli.commands.generate import make_streamer
    from nemo_bard.evaluation.responder import load_checkpoint

    _, processor = load_checkpoint(folder / "bard")
    assert not hasattr(make_streamer(processor.tokenizer), "put_draft")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert hasattr(make_streamer(processor.tokenizer), "put_draft")
