"""Which noise holds at which step."""

from dataclasses import dataclass

import pytest

from nemo_bard.method.noise import NOISES, MaskNoise, UniformNoise
from nemo_bard.method.schedule import NoiseSchedule, NoiseSettings, ValidationNoise

CURRICULUM = {
    "name": "mask",
    "low": 0.1,
    "schedule": [{"until": 0.3, "high": 0.5}, {"until": 0.6, "ramp": True}, {"name": "mixed", "low": 0.2}],
}


def test_without_a_schedule_the_noise_never_changes():
    schedule = NoiseSchedule.from_dict({"name": "mixed", "low": 0.2})
    assert {schedule.at(step, 7) for step in range(7)} == {(0, NoiseSettings(name="mixed", low=0.2))}
    assert NoiseSchedule.from_dict(None).at(0, 1) == (0, NoiseSettings())


def test_phases_follow_each_other_and_replace_keys_of_the_section():
    schedule = NoiseSchedule.from_dict(CURRICULUM)
    assert schedule.first_steps(10) == [0, 3, 6, 10]
    found = [schedule.at(step, 10) for step in range(10)]
    assert [number for number, _ in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert {noise for _, noise in found[:3]} == {NoiseSettings(low=0.1, high=0.5)}
    assert {noise for _, noise in found[6:]} == {NoiseSettings(name="mixed", low=0.2, high=1.0)}


def test_a_ramp_reaches_its_own_levels_at_its_last_step():
    schedule = NoiseSchedule.from_dict(CURRICULUM)
    highs = [schedule.at(step, 10)[1].high for step in range(2, 7)]
    assert highs == pytest.approx([0.5, 0.5 + 0.5 / 3, 0.5 + 1.0 / 3, 1.0, 1.0])
    assert [schedule.at(step, 10)[1].low for step in range(3, 6)] == pytest.approx([0.1] * 3)
    for steps in range(1, 200):
        for step in range(steps):
            noise = schedule.at(step, steps)[1]
            assert noise.low <= noise.high <= 1.0


@pytest.mark.parametrize("until", [0.1, 0.3, 0.7, 0.55])
def test_a_boundary_is_the_rounded_fraction(until):
    schedule = NoiseSchedule.from_dict({"schedule": [{"until": until}, {"high": 0.5}]})
    numbers = [schedule.at(step, 1000)[0] for step in range(1000)]
    assert numbers == [0] * round(until * 1000) + [1] * (1000 - round(until * 1000))


def test_complementary_holds_in_all_phases():
    values = {"complementary": True, "schedule": [{"until": 0.5, "low": 0.4, "high": 0.6}, {"ramp": True}]}
    schedule = NoiseSchedule.from_dict(values)
    for step in range(8):
        levels = schedule.at(step, 8)[1].levels()
        assert levels.low + levels.high == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "noise.schedule must be a list of phases"),
        ("mask", "noise.schedule must be a list of phases"),
        ([3], "noise.schedule[0] must be a section of keys, got 3"),
        ([{"untill": 0.3}, {}], "unknown recipe key noise.schedule[0].untill; did you mean noise.schedule[0].until?"),
        ([{"until": 0.3, "num_random_ids": 9}, {}], "unknown recipe key noise.schedule[0].num_random_ids"),
        ([{}, {}], "noise.schedule[0].until must be a fraction of the run between 0 and 1, got None"),
        ([{"until": 0}, {}], "noise.schedule[0].until must be a fraction of the run between 0 and 1, got 0"),
        ([{"until": 1.5}, {}], "noise.schedule[0].until must be a fraction of the run between 0 and 1, got 1.5"),
        ([{"until": "half"}, {}], "noise.schedule[0].until must be a fraction of the run between 0 and 1, got 'half'"),
        ([{"until": 0.5}, {"until": 0.5}, {}], "noise.schedule[1].until must be greater than that of the phase before"),
        ([{"until": 0.5}, {"until": 0.8}], "noise.schedule[1].until: the last phase is open; leave it out, got 0.8"),
        (
            [{"until": 0.5}, {"name": "maks"}],
            "noise.schedule[1]: noise.name must be one of mask, uniform, mixed, got 'maks' (did you mean 'mask'?)",
        ),
        ([{"until": 0.5}, {"low": 0.0}], "noise.schedule[1]: noise.low must be in (0, 1], got 0.0"),
        ([{"until": 0.5, "ramp": True}, {}], "noise.schedule[0].ramp: the first phase has no levels before it"),
        ([{"until": 0.5}, {"ramp": "yes"}], "noise.schedule[1].ramp must be true or false, got 'yes'"),
        ([{"until": 0.5}, {"min_masked": 1}], "noise.schedule[1]: noise.min_masked=1 needs"),
    ],
)
def test_bad_schedules_are_one_line(values, message):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        NoiseSchedule.from_dict({"schedule": values})
    assert message in str(caught.value)


def test_a_phase_that_does_not_fit_complementary_noise_is_named():
    with pytest.raises(ValueError, match=r"noise.schedule\[1\]: noise.complementary needs noise.name: mask"):
        NoiseSchedule.from_dict({"complementary": True, "schedule": [{"until": 0.5}, {"name": "mixed"}]})


class TestParameters:
    """Parameters of a noise, here ``max_t`` of uniform noise, are keys of every section that names it."""

    def test_a_phase_replaces_them_and_another_noise_has_none_of_them(self):
        phases = [{"until": 0.3}, {"until": 0.6, "max_t": 0.5}, {"name": "mask"}]
        schedule = NoiseSchedule.from_dict({"name": "uniform", "max_t": 0.9, "schedule": phases})
        assert [phase.settings.parameters for phase in schedule.phases] == [(("max_t", 0.9),), (("max_t", 0.5),), ()]
        assert [getattr(phase.settings.noise, "max_t", None) for phase in schedule.phases] == [0.9, 0.5, None]

    def test_validation_has_those_of_training_unless_it_says_more(self):
        training = NoiseSettings.from_dict({"name": "uniform", "max_t": 0.9, "low": 0.5})
        default = ValidationNoise.from_dict(None, training)
        assert (default.settings.noise, default.settings.low) == (UniformNoise(max_t=0.9), 1e-3)
        own = ValidationNoise.from_dict({"name": "uniform", "levels": [0.5, 1.0]}, training)
        assert [noise.noise for noise in own.levels] == [UniformNoise()] * 2
        assert own.names() == ["val_loss_t0.5", "val_loss_t1"]

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"name": "uniform", "maxt": 1},
                "unknown recipe key validation_noise.maxt; did you mean validation_noise.max_t?",
            ),
            ({"name": "uniform", "max_t": 2}, "validation_noise.max_t must be in (0, 1], got 2"),
            ({"name": "unifrom"}, "validation_noise.name must be one of mask, uniform, mixed, got 'unifrom'"),
        ],
    )
    def test_wrong_ones_are_named_where_they_stand(self, values, message):
        with pytest.raises(ValueError, match="^[^\n]*$") as caught:
            ValidationNoise.from_dict(values, NoiseSettings())
        assert message in str(caught.value)

    def test_a_noise_must_not_take_a_name_of_the_section(self):
        @dataclass(frozen=True, kw_only=True)
        class Low(MaskNoise):
            low: float = 0.5

        NOISES.register("low", Low)
        try:
            with pytest.raises(ValueError, match="^noise low: its parameter 'low' is a key of the section itself"):
                NoiseSettings.from_dict({"name": "low"})
        finally:
            NOISES.unregister("low")

    @pytest.mark.parametrize("thing", [object(), int, UniformNoise()])
    def test_what_is_no_noise_is_refused(self, thing):
        with pytest.raises(ValueError, match="not a dataclass below nemo_bard.method.Noise"):
            NOISES.register("other", thing)
