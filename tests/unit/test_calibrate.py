"""The sweep, the choice and what is written; measuring is a stand-in, decoding itself is tested elsewhere."""

import json
import types

import pytest
from PIL import Image

from nemo_bard.evaluation import calibrate as cal
from nemo_bard.generation.settings import BardGenerationConfig


def setting(size=4, steps=4, threshold=0.5):
    strategy = "low_confidence_dynamic" if threshold is not None else "low_confidence_static"
    parameters = (("confidence_threshold", threshold),) if threshold is not None else ()
    return cal.Setting(block_size=size, denoising_steps=steps, strategy=strategy, parameters=parameters)


def threshold_of(setting):
    return dict(setting.parameters).get("confidence_threshold")


def point(score, speed, tpf=1.0, **kwargs):
    return cal.Point(
        setting=setting(**kwargs), score=score, tokens_per_second=speed, tpf=tpf, tpf_with_commits=tpf, seconds=1.0
    )


def test_default_grid():
    grid = cal.make_grid([8])
    assert [threshold_of(s) for s in grid if threshold_of(s)] == [0.5, 0.7, 0.8, 0.9, 0.95]
    assert [s.denoising_steps for s in grid if threshold_of(s) is None] == [8, 4, 2, 1]


def test_grid_is_the_product_without_repetition():
    grid = cal.make_grid([2, 4], steps=[1, 4, 9], values={"confidence_threshold": [0.5, 0.9]})
    assert len(grid) == len(set(grid))
    expected = {(b, min(s, b), t) for b in (2, 4) for s in (1, 4, 9) for t in (0.5, 0.9, None)}
    assert {(s.block_size, s.denoising_steps, threshold_of(s)) for s in grid} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_sizes": [0]}, "block_size must be an integer >= 1, got 0"),
        ({"block_sizes": [4], "steps": [0]}, "denoising_steps must be an integer >= 1, got 0"),
        (
            {"block_sizes": [4], "values": {"confidence_threshold": [1.5]}},
            r"confidence_threshold must be in \(0, 1\], got 1.5",
        ),
        ({"block_sizes": [4], "values": {"confidence_threshold": []}}, "confidence_threshold must not be empty"),
        ({"block_sizes": [4], "values": {"threshold": [0.5]}}, "did you mean confidence_threshold?"),
        ({"block_sizes": [4], "strategies": ["fast"]}, "'fast'"),
    ],
)
def test_wrong_grid(arguments, message):
    with pytest.raises(ValueError, match=message):
        cal.make_grid(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"objective": "speed"}, "tokens_per_second, tpf"),
        ({"baseline": 90.0}, "baseline"),
    ],
)
def test_wrong_goal(arguments, message):
    with pytest.raises(ValueError, match=message):
        cal.Goal(**arguments)


def test_choice_is_the_fastest_within_the_tolerance():
    points = [point(0.900, 10, 1), point(0.895, 20, 3), point(0.894, 40, 2), point(0.5, 99, 9)]
    chosen, reference = cal.choose(points, cal.Goal(tolerance=0.5))
    assert (chosen.tokens_per_second, reference) == (20, 0.9)
    assert cal.choose(points, cal.Goal(tolerance=0.6))[0].tokens_per_second == 40
    assert cal.choose(points, cal.Goal(tolerance=0.6, objective="tpf"))[0].tokens_per_second == 20
    assert cal.choose(points, cal.Goal(tolerance=0))[0].tokens_per_second == 10
    assert cal.choose(points, cal.Goal(tolerance=1, baseline=0.5))[0].tokens_per_second == 99
    assert cal.choose([point(0.8, 5), point(0.9, 5)], cal.Goal(tolerance=50))[0].score == 0.9
    with pytest.raises(ValueError, match=r"baseline 99\.00 %; the best reaches 90\.00 %"):
        cal.choose(points, cal.Goal(tolerance=0.5, baseline=0.99))


def test_pareto_front_equals_its_definition():
    points = [point(s / 10, v) for s, v in [(9, 1), (8, 3), (8, 2), (5, 3), (7, 9), (9, 1), (1, 10)]]

    def beaten(p):
        return any(
            (q.score >= p.score and q.tokens_per_second > p.tokens_per_second)
            or (q.score > p.score and q.tokens_per_second >= p.tokens_per_second)
            for q in points
        )

    front = cal.pareto(points, lambda p: p.tokens_per_second)
    expected = {(p.score, p.tokens_per_second) for p in points if not beaten(p)}
    assert {(p.score, p.tokens_per_second) for p in front} == expected
    assert [p.tokens_per_second for p in front] == sorted(p.tokens_per_second for p in front)


def test_a_setting_becomes_a_generation_config():
    base = BardGenerationConfig(max_new_tokens=7, eos_token_id=[1, 2], denoising_steps=3)
    config = setting(8, 8, 0.9).apply(base, 4)
    assert (config.block_size, config.denoising_steps, config.confidence_threshold) == (8, None, 0.9)
    assert (config.max_new_tokens, config.eos_token_id) == (7, [1, 2])
    assert setting(4, 2, None).apply(base, 4).block_size is None  # the checkpoint's own stays in its config.json
    assert cal.current_setting(config, 4) == setting(8, 8, 0.9)
    other = cal.current_setting(BardGenerationConfig(remasking_strategy="entropy_bound", entropy_bound=0.3), 4)
    assert (other.strategy, other.parameters) == ("entropy_bound", (("entropy_bound", 0.3),))
    assert str(other) == "B = 4, 4 steps, entropy_bound 0.3"


def test_settings_read_as_text():
    assert str(setting(8, 1, 0.9)) == "B = 8, 1 step, threshold 0.9"
    assert str(setting(8, 4, None)) == "B = 8, 4 steps, static"


def test_a_strategy_brings_the_values_to_try():
    grid = cal.make_grid([4], strategies=["entropy_bound"])
    assert {name for point in grid for name, _ in point.parameters} == {"entropy_bound"}
    assert len(grid) == 5
    assert {point.denoising_steps for point in grid} == {4}


MODEL = types.SimpleNamespace(
    generation_config=BardGenerationConfig(max_new_tokens=50, confidence_threshold=0.6),
    config=types.SimpleNamespace(block_size=4),
    device=types.SimpleNamespace(type="cpu"),
    dtype="torch.float32",
)


@pytest.fixture
def sweep(monkeypatch):
    """Replaces measuring: few steps are fast and bad, and the second round takes half the time."""
    calls = []

    def fake(model, processor, dataset, *, generation_config, warm_up, **_):
        steps = generation_config.denoising_steps or 4
        calls.append((generation_config, warm_up))
        seconds = steps * (1.0 if warm_up else 0.5)
        return types.SimpleNamespace(
            score=0.5 + steps / 10,
            tokens_per_second=100 / seconds,
            tpf=4 / steps,
            tpf_with_commits=4 / steps,
            seconds=seconds,
            num_samples=40,
            metric="accuracy",
        )

    monkeypatch.setattr(cal, "evaluate", fake)
    return calls


def test_sweep_measures_the_present_setting_too(sweep, caplog):
    grid = cal.make_grid([4], steps=[1, 2, 4], values={"confidence_threshold": [0.9]})
    result = cal.calibrate(MODEL, None, [], grid, cal.Goal(tolerance=20), max_new_tokens=9)
    assert len(result.points) == 7
    assert result.points[0].setting == setting(4, 4, 0.6)
    assert len(sweep) == 14
    assert [warm for _, warm in sweep] == [True] * 7 + [False] * 7
    assert {config.max_new_tokens for config, _ in sweep} == {9}
    assert result.chosen.setting.denoising_steps == 2
    assert result.chosen.tokens_per_second == 100  # of the faster round
    assert result.config.max_new_tokens == 50  # the limit while measuring is not written
    assert (result.metric, result.reference, result.num_samples) == ("accuracy", 0.9, 40)
    assert not caplog.records
    cal.calibrate(MODEL, None, [], grid, cal.Goal(tolerance=1), repeats=1)
    assert "one answer is 2.50 points" in caplog.text


def test_results_are_written(sweep, tmp_path):
    result = cal.calibrate(MODEL, None, [], cal.make_grid([4, 8], steps=[1, 4]), cal.Goal(tolerance=5))
    files = cal.write_results(result, tmp_path / "new")
    assert sorted(file.name for file in files) == ["calibration.json", "calibration.png", "generation_config.json"]
    table = json.loads((tmp_path / "new/calibration.json").read_text())
    assert len(table["points"]) == len(result.points)
    assert table["chosen"]["score"] == result.chosen.score
    assert table["goal"]["tolerance"] == 5
    with Image.open(tmp_path / "new/calibration.png") as image:
        assert image.width > 1000
    loaded = BardGenerationConfig.from_pretrained(tmp_path / "new")
    assert loaded.to_dict() == result.config.to_dict() | {"transformers_version": loaded.transformers_version}


def test_model_folder_keeps_every_earlier_file(sweep, tmp_path):
    result = cal.calibrate(MODEL, None, [], cal.make_grid([4], steps=[1]), cal.Goal(tolerance=90))
    assert cal.write_into_model(result, tmp_path) is None
    file = tmp_path / "generation_config.json"
    ours = file.read_text()
    for number, content in enumerate(['{"a": 1}', '{"b": 2}', '{"c": 3}'], start=1):
        (tmp_path / f"elsewhere{number}").write_text(content)
        file.unlink()
        file.hardlink_to(tmp_path / f"elsewhere{number}")
        backup = cal.write_into_model(result, tmp_path)
        assert backup.read_text() == content
        assert (tmp_path / f"elsewhere{number}").read_text() == content
        assert file.read_text() == ours
    assert len(list(tmp_path.glob("generation_config.before-calibration*.json"))) == 3


def test_scores_outside_zero_to_one_are_refused(sweep, monkeypatch):
    result = types.SimpleNamespace(score=42.0, metric="points", seconds=1.0, num_samples=9)
    monkeypatch.setattr(cal, "evaluate", lambda *_, **__: result)
    with pytest.raises(ValueError, match=r"points is 42\.0"):
        cal.calibrate(MODEL, None, [], cal.make_grid([4]))
