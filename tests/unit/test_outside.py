"""A strategy with a parameter of its own and an engine from another package: one class and one entry point each."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from golden_data import GOLDEN

from nemo_bard.base.settings import fraction, number, setting
from nemo_bard.generation import STRATEGIES, Strategy
from nemo_bard.generation.settings import BardGenerationConfig

PACKAGE = '''
from dataclasses import dataclass
from typing import ClassVar
from nemo_bard.base.settings import number, setting
from nemo_bard.generation.strategies import Strategy


@dataclass(frozen=True, kw_only=True)
class Margin(Strategy):
    """Fix what is at most a margin less likely than the best."""

    swept: ClassVar = {"best_margin": (0.1, 0.2)}
    best_margin: float = setting(0.25, number(), "how far under the best")

    def fix(self, state):
        best = state.confidence.amax(-1, keepdim=True)
        return (state.confidence >= best - self.best_margin) & state.is_masked
'''
ENGINE = """
from nemo_bard.generation.engines import PlainEngine


class Counting(PlainEngine):
    made = 0

    def __init__(self, session):
        type(self).made += 1
        super().__init__(session)
"""
CHECK = """
import torch
from nemo_bard import BardGenerationConfig, BardVLForConditionalGeneration
from nemo_bard.cli import main
from nemo_bard.evaluation.calibrate import make_grid
from nemo_bard.generation.parameters import settings_reference
import outside_engine

name, engine = {names!r}
config = BardGenerationConfig(remasking_strategy=name, best_margin=0.5, decode_path=engine)
config.save_pretrained({folder!r})
assert BardGenerationConfig.from_pretrained({folder!r}).best_margin == 0.5
try:
    config.updated(best_margin=-1)
except ValueError as error:
    assert str(error) == "best_margin must be a finite number >= 0, got -1", error
else:
    raise AssertionError
model = BardVLForConditionalGeneration.from_pretrained({model!r})
settings = dict(max_new_tokens=8, block_size=8, mask_token_id=509, eos_token_id=-1, remasking_strategy=name)
few = model.generate(torch.tensor([[5, 6]]), best_margin=1.0, return_step_stats=True, **settings)[1]
many = model.generate(torch.tensor([[5, 6]]), best_margin=0.0, decode_path=engine, return_step_stats=True, **settings)[1]
assert few["num_denoising_steps"] == [1] and many["num_denoising_steps"] == [8]
assert outside_engine.Counting.made == 1
grid = make_grid([4], strategies=[name])
assert [dict(point.parameters) for point in grid] == [{{"best_margin": 0.1}}, {{"best_margin": 0.2}}]
if "." not in name:
    assert name in {{point.strategy for point in make_grid([4])}}
    assert "| `best_margin` | `0.25` | a finite number >= 0 | how far under the best |" in settings_reference()
for command, option in (("generate", "--remasking-strategy"), ("evaluate", "--remasking-strategy"), ("calibrate", "--strategies")):
    try:
        main([command, option, name, "--help"])
    except SystemExit as end:
        assert end.code == 0
"""


@pytest.mark.parametrize(
    "names", [("margin", "counting"), ("outside_strategy.Margin", "outside_engine.Counting")], ids=["entry", "dotted"]
)
def test_a_package_brings_a_strategy_and_an_engine(names, tmp_path, install_package):
    declared = (
        "[nemo_bard.strategies]\nmargin = outside_strategy:Margin\n"
        "[nemo_bard.engines]\ncounting = outside_engine:Counting\n"
    )
    modules = {"outside_strategy": PACKAGE, "outside_engine": ENGINE}
    install_package(tmp_path, "outside", modules, declared if names[0] == "margin" else "")
    code = CHECK.format(names=names, folder=str(tmp_path / "saved"), model=str(GOLDEN / "models/tiny_untied"))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("  --best-margin") == 3


def strategy(**parameters):
    from dataclasses import make_dataclass

    fields = [(name, float, field) for name, field in parameters.items()]
    namespace = {"fix": lambda self, state: state.is_masked}
    return make_dataclass("Own", fields, bases=(Strategy,), namespace=namespace, frozen=True, kw_only=True)


def test_a_strategy_registered_at_run_time_is_a_setting_until_it_is_taken_back():
    STRATEGIES.register("own", strategy(own_part=setting(0.5, fraction(), "a part")))
    try:
        assert BardGenerationConfig(remasking_strategy="own", own_part=0.2).resolve()[1].own_part == 0.2
    finally:
        STRATEGIES.unregister("own")
    with pytest.raises(ValueError, match="unknown generation setting 'own_part'"):
        BardGenerationConfig(own_part=0.2)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"confidence_threshold": setting(0.5, number(), "")}, "own and low_confidence_dynamic declare the parameter"),
        ({"top_k": setting(0.5, number(), "")}, "the parameter top_k of own has the name of a general setting"),
        ({"own_part": setting(0.5)}, r"own.own_part must be made with setting\(\)"),
    ],
)
def test_parameters_that_do_not_agree_are_refused_by_both_names(parameters, message):
    with pytest.raises(ValueError, match=message):
        STRATEGIES.register("own", strategy(**parameters))
    assert "own" not in STRATEGIES
