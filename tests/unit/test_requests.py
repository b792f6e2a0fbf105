"""What a request may ask: every wrong value is one short line that names the key; what passes is what ``generate`` takes."""

import json
import math

import pytest

from nemo_bard.generation.parameters import build_settings, setting_fields
from nemo_bard.serving.body import NOT_SUPPORTED, Asked, check_body
from nemo_bard.serving.requests import ELSEWHERE, REFUSED, BadRequest, check_xargs, error_body, request_settings

B = 8


def refused(call, *args, **kwargs):
    """The error of a call, which must be one line that fits a terminal."""
    with pytest.raises(BadRequest) as caught:
        call(*args, block_size=B, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    json.dumps(error_body(caught.value))
    return caught.value


def test_every_setting_of_generate_is_asked_refused_or_named_otherwise():
    groups = [set(request_settings()), set(REFUSED), set(ELSEWHERE)]
    assert set.union(*groups) == set(setting_fields())
    assert sum(map(len, groups)) == len(setting_fields())


NONSENSE = ["abc", "", "x" * 10**7, math.nan, math.inf, -1, -0.5, 10**400, -(10**5000), [0.5], {"a": 1}, (), None]


@pytest.mark.parametrize("name", request_settings())
@pytest.mark.parametrize("value", NONSENSE, ids=range(len(NONSENSE)))
def test_no_setting_takes_nonsense(name, value):
    error = refused(check_xargs, {name: value})
    assert f"vllm_xargs.{name}" in str(error)
    assert error.param == f"vllm_xargs.{name}"


@pytest.mark.parametrize("name", [name for name in request_settings() if name != "suppress_mask_token"])
def test_a_flag_is_no_number(name):
    assert f"vllm_xargs.{name} must be" in str(refused(check_xargs, {name: True}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"confidence_treshold": 0.9}, "did you mean confidence_threshold?"),
        ({"k" * 1000: 1}, "unknown setting"),
        ({3: 4}, "unknown setting vllm_xargs.3"),
        ({"remasking_strategy": "os.system"}, "must be one of low_confidence_static"),
        ({"remasking_strategy": "entropy_bond"}, "did you mean 'entropy_bound'?"),
        ({"block_size": 4}, "must be 8, which the server runs with, got 4"),
        ({"max_new_tokens": 4}, "use max_tokens"),
        ({"decode_path": "plain"}, "is the server's"),
        ({"top_k": 2**31}, "at most 2147483647"),
        ({"entropy_bound": 1e300}, "at most 1000000"),
        ({"temperature": 2.5}, "must be 0, or from 1e-06 to 2, got 2.5"),
        ({"temperature": 1e-30}, "must be 0, or from 1e-06 to 2"),
        ({"edit_threshold": 0.9, "max_post_edit_steps": 65}, "at most 64"),
        ({"max_post_edit_steps": 2}, "needs edit_threshold"),
        ({"seed": 2**63}, "an integer of 64 bits"),
        ({"seed": "3"}, "an integer of 64 bits"),
        ([1], "must be an object"),
        ("temperature=1", "must be an object"),
    ],
)
def test_wrong_settings(given, said):
    assert said in str(refused(check_xargs, given))


def test_what_passes_builds_settings_over_the_defaults():
    defaults = {"confidence_threshold": 0.7, "edit_threshold": 0.9}
    given = {
        "max_post_edit_steps": 2,
        "suppress_mask_token": 0,
        "denoising_steps": 10**6,
        "block_size": B,
        "temperature": 1,
    }
    checked = check_xargs({**given, "seed": -5}, block_size=B, defaults=defaults)
    assert checked.pop("seed") == -5
    assert checked == {**given, "suppress_mask_token": False}
    assert checked["suppress_mask_token"] is False
    general, strategy = build_settings({**defaults, **checked})
    assert (general.max_post_edit_steps, general.edit_threshold, strategy.confidence_threshold) == (2, 0.9, 0.7)
    assert check_xargs(None, block_size=B) == {}


DOTTED = "strategies_of_requests.Own"


def test_only_the_server_names_a_dotted_strategy(monkeypatch):
    import sys
    from types import ModuleType

    from nemo_bard.generation.strategies import LowConfidenceStatic

    module = ModuleType("strategies_of_requests")
    module.Own = LowConfidenceStatic
    monkeypatch.setitem(sys.modules, module.__name__, module)
    refused(check_xargs, {"remasking_strategy": DOTTED})
    defaults = {"remasking_strategy": DOTTED}
    assert check_xargs(defaults, block_size=B, defaults=defaults) == defaults
    assert check_xargs({"remasking_strategy": "entropy_bound"}, block_size=B, defaults=defaults)


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        ({"logprobs": True}, "logprobs is not supported", "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs is not supported", "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, 'allowed: {"type": "text"}', "response_format"),
        ({"tools": [{"type": "function"}]}, "calls no tools", "tools"),
        ({"frequency_penalty": 0.5}, "allowed: 0", "frequency_penalty"),
        ({"logit_bias": {"5": 10}}, "not biased", "logit_bias"),
        ({"n": 2}, "n must be 1 with temperature 0", "n"),
        ({"n": 2, "temperature": 0}, "n must be 1 with temperature 0", "n"),
        ({"n": 2, "vllm_xargs": {"temperature": 0}}, "n must be 1 with temperature 0", "n"),
        ({"n": 10**9, "temperature": 1}, "n must be an integer from 1 to 16", "n"),
        ({"n": True}, "n must be an integer", "n"),
        ({"max_tokens": 0}, "max_tokens must be an integer from 1", "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens must be an integer from 1", "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens must be", "max_completion_tokens"),
        ({"temperature": "hot"}, "temperature must be a finite number", "temperature"),
        ({"temperature": math.nan}, "temperature must be", "temperature"),
        ({"top_p": 0}, "top_p must be in (0, 1]", "top_p"),
        ({"seed": 1.0}, "seed must be an integer of 64 bits", "seed"),
        ({"seed": 1, "vllm_xargs": {"seed": 2}}, "given twice", "seed"),
        ({"top_k": 1, "vllm_xargs": {"top_k": 2}}, "given twice", "top_k"),
        ({"stream": "yes"}, "stream must be true or false", "stream"),
        ({"stream_options": {"usage": True}}, "stream_options must be", "stream_options"),
        ({"stop": [""]}, "stop must be", "stop"),
        ({"stop": ["a"] * 17}, "stop must be", "stop"),
        ({"stop": {"a": 1}}, "stop must be", "stop"),
        ({"messags": []}, "did you mean messages?", "messags"),
        ({"vllm_xargs": "x"}, "must be an object", "vllm_xargs"),
        ({"vllm_xargs": {"denoising_steps": 0}}, "must be an integer >= 1", "vllm_xargs.denoising_steps"),
        ([{}], "must be a JSON object", None),
    ],
)
def test_wrong_bodies(body, said, param):
    error = refused(check_body, body)
    assert said in str(error)
    assert error.param == param


def test_a_body_that_asks_for_nothing_special():
    nothing = dict.fromkeys(
        [*NOT_SUPPORTED, "temperature", "seed", "stop", "n", "max_tokens", "vllm_xargs", "edit_threshold"]
    )
    assert check_body(nothing, block_size=B) == Asked(settings={})
    neutral = {
        "logprobs": False,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "logit_bias": {},
    }
    neutral |= {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1, "min_p": 0, "user": "me"}
    assert check_body(neutral, block_size=B) == Asked(settings={})


def test_settings_come_from_both_places():
    body = {
        "model": "m",
        "messages": [],
        "temperature": 0.5,
        "edit_threshold": 0.9,
        "vllm_xargs": {"max_post_edit_steps": 2, "seed": 3, "temperature": 0.5},
        "n": 4,
        "max_tokens": 9,
        "max_completion_tokens": 8,
        "stop": "end",
        "stream": True,
        "stream_options": {"include_usage": True},
        "bard_drafts": True,
    }
    asked = check_body(body, block_size=B, extensions=("bard_drafts",))
    settings = {"temperature": 0.5, "edit_threshold": 0.9, "max_post_edit_steps": 2}
    assert asked == Asked(settings=settings, seed=3, n=4, max_tokens=8, stop=("end",), stream=True, include_usage=True)
    assert "bard_drafts" in str(refused(check_body, body))


def test_error_body_is_openais():
    error = error_body(BadRequest("a\nb", "n"))["error"]
    assert error == {"message": "a b", "type": "invalid_request_error", "param": "n", "code": 400}
