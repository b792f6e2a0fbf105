"""A chain of LoRA stages, trained, and kept as adapters on its start point."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_pipeline import drive, source, words  # noqa: F401 (a fixture)

from nemo_bard.cli.app import main

pytestmark = [pytest.mark.slow, pytest.mark.chain]
LORA = '{_target_: nemo_automodel.components._peft.lora.PeftConfig, target_modules: ["*_proj"], dim: 4, alpha: 32}'
CALL = {"max_new_tokens": 24, "eos_token_id": -1}


def test_a_trained_chain_as_adapters(source, tmp_path):  # noqa: F811
    from transformers import Qwen3VLForConditionalGeneration

    from nemo_bard import BardVLForConditionalGeneration
    from nemo_bard.data import make_digits
    from nemo_bard.data.encode import encode_prompts
    from nemo_bard.evaluation.responder import load_checkpoint

    run = tmp_path / "run"
    more = ["order=[start,pbm_b4,pbm_b8]", "model.context_attention=causal", f"overrides.peft={LORA}"]
    more += [f"stage.{name}.max_steps=12" for name in ("pbm_b4", "pbm_b8")]
    more += [f"stage.{name}.learning_rate=3.0e-3" for name in ("pbm_b4", "pbm_b8")]
    given = [word for word in words(source, run, *more) if "swd" not in word or word.startswith("order=")]
    done = drive(tmp_path, [{"words": list({word.split("=")[0]: word for word in given}.values()), "kill": None}])
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["export", str(run), str(tmp_path / "adapted"), "--adapter"]) == 0

    model, processor = load_checkpoint(tmp_path / "adapted", device="cpu")
    sample = make_digits("test", num_samples=1, rows=1)[0]
    turns = [turn for turn in sample["conversation"] if turn["role"] == "user"]
    batch = encode_prompts(processor, [turns])
    answers = {None: model.generate(batch, **CALL)}
    for name in ("b4", "b8"):
        merged = BardVLForConditionalGeneration.from_pretrained(run / f"pbm_{name}" / "export").eval()
        answers[name] = model.generate(batch, adapter=name, **CALL)
        assert answers[name].equal(merged.generate(batch, **CALL))
    assert not answers["b4"].equal(answers["b8"]), "stages have learnt something"
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(source).eval()
    with torch.no_grad():
        expected = theirs.generate(**batch, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answers[None].equal(expected[:, batch["input_ids"].shape[1] :])
