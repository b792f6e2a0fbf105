"""Requests for next-token decoding: answered by the local server, refused in one line where the model or vLLM cannot."""

from __future__ import annotations

import json
import types

import pytest
from local_server import ask, events, request, serving

pytest.importorskip("fastapi", reason="needs nemo-bard[serve]")
pytest.importorskip("uvicorn", reason="needs nemo-bard[serve]")
pytest.importorskip("prometheus_client", reason="needs nemo-bard[serve]")

NAMES = ("autoregressive", "self_speculative")


@pytest.fixture(scope="module")
def causal(start, tmp_path_factory):
    """The start point with a causal context, loaded."""
    import shutil

    from nemo_bard.evaluation.responder import load_checkpoint

    folder = shutil.copytree(start, tmp_path_factory.mktemp("causal") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "context_attention": "causal"}))
    return load_checkpoint(folder, device="cpu")


@pytest.fixture(scope="module")
def port(causal):
    with serving(*causal) as found:
        yield found


def content(answer):
    return answer["choices"][0]["message"]["content"]


def test_the_local_server_answers_with_the_same_ids(port, causal):
    from nemo_bard.data.encode import encode_prompts

    model, processor = causal
    batch = encode_prompts(processor, [[{"role": "user", "content": "one two three"}]])
    ids = model.generate(batch, max_new_tokens=12, remasking_strategy="autoregressive")[0].tolist()
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True)
    for name in NAMES:
        status, _, answer = request(port, ask("one two three", remasking_strategy=name))
        assert (status, content(answer)) == (200, expected)
    status, _, streamed = request(port, ask("one two three", remasking_strategy=NAMES[1], stream=True, drafts=2))
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events(streamed)]
    assert (status, "".join(pieces)) == (200, expected)


def test_the_page_gets_steps_and_a_stop_string_ends_the_decoding(port):
    whole = content(request(port, ask("one two", remasking_strategy=NAMES[1], max_tokens=60))[2])
    stop = whole[len(whole) // 4 :][:2]
    asked = ask("one two", remasking_strategy=NAMES[1], max_tokens=60, stop=[stop], stream=True, bard_drafts=True)
    told = events(request(port, asked)[2])
    steps = [event["bard"]["step"] for event in told if "step" in event.get("bard", {})]
    assert [step["step"] for step in steps if step["block"] == 0] == list(
        range(len([s for s in steps if s["block"] == 0]))
    )
    numbers = next(event["bard"]["numbers"] for event in told if "numbers" in event.get("bard", {}))
    assert numbers["tokens"] < 60
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in told if event["choices"])
    assert text == whole[: whole.index(stop)]


def test_the_page_offers_what_the_model_can(port, start):
    from nemo_bard.evaluation.responder import load_checkpoint

    facts = request(port, None, path="/v1/bard", method="GET")[2]
    assert set(NAMES) <= set(facts["strategies"])
    with serving(*load_checkpoint(start, device="cpu")) as other:
        facts = request(other, None, path="/v1/bard", method="GET")[2]
        assert not set(NAMES) & set(facts["strategies"])
        choices = next(one["choices"] for one in facts["settings"] if one["name"] == "remasking_strategy")
        assert choices == list(facts["strategies"])
        for name in NAMES:
            status, _, answer = request(other, ask("one", remasking_strategy=name))
            assert status == 400
            assert answer["error"]["message"].startswith(
                f"remasking_strategy={name} needs a checkpoint with context_att"
            )


@pytest.mark.parametrize("name", NAMES)
def test_vllm_refuses(name, start):
    from nemo_bard.serving.vllm import checks, config

    hf_config = config.ServedBardVLConfig(block_size=4, mask_token_id=60, eos_token_id=9, context_attention="causal")
    hf_config.served_defaults = {}
    params = types.SimpleNamespace(
        temperature=0.0, seed=None, n=1, extra_args={"remasking_strategy": name}, **checks.NEUTRAL
    )
    with pytest.raises(ValueError, match=f"one of low_confidence_static, .*entropy_bound, got '{name}'"):
        checks._check(params, hf_config)
    model_config = types.SimpleNamespace(
        model=str(start),
        revision=None,
        generation_config="vllm",
        override_generation_config={"remasking_strategy": name},
    )
    with pytest.raises(ValueError, match=f"remasking_strategy must be one of low_.* with vLLM, got '{name}'"):
        config.read_defaults(model_config)
