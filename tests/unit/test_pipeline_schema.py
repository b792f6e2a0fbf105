"""What Hydra refuses, in files as on the command line, as one line with the nearest name; and what stays free."""

import dataclasses
from dataclasses import dataclass

import pytest
import yaml

from nemo_bard.base.paths import conf_dir, recipes_dir
from nemo_bard.base.settings import integer, reference, setting
from nemo_bard.launch.launchers import LAUNCHERS, Launcher, LaunchSettings
from nemo_bard.pipeline.compose import compose, read_words
from nemo_bard.pipeline.job import STAGE_KINDS, make_job
from nemo_bard.pipeline.schema import ChainSettings, EvaluationSettings, ModelSettings
from nemo_bard.pipeline.structured import Schema, register


def composed(*words, recipe="bard_b32"):
    return compose(read_words(recipes_dir() / f"{recipe}.yaml", ["data.path=x", *words]))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["stage.pbm_b4.max_stesp=1"],
            "unknown key stage.pbm_b4.max_stesp in 'stage.pbm_b4.max_stesp=1'; did you mean stage.pbm_b4.max_steps?",
        ),
        (["evaluation.limt=1"], "unknown key evaluation.limt in 'evaluation.limt=1'; did you mean evaluation.limit?"),
        (["data.max_lenght=4"], "unknown key data.max_lenght in 'data.max_lenght=4'; did you mean data.max_length?"),
        (
            ["launch=slurm", "launch.nodse=2"],
            "unknown key launch.nodse in 'launch.nodse=2'; did you mean launch.nodes?",
        ),
        (["stage.pbm_b4.max_steps=many"], "stage.pbm_b4.max_steps must be an integer >= 1 or null, got 'many'"),
        (["stage.pbm_b4.max_steps=1.5"], "stage.pbm_b4.max_steps must be an integer >= 1 or null, got 1.5"),
        (
            ["stage.pbm_b4.learning_rate=true"],
            "stage.pbm_b4.learning_rate must be a finite number >= 0 or null, got True",
        ),
        (["stage.pbm_b4.data=maybe"], "stage.pbm_b4.data must be true or false, got 'maybe'"),
        (["stage.pbm_b4.overrides=3"], "stage.pbm_b4.overrides must be a section or null, got '3'"),
        (["order=pbm_b4"], "order must be a list of names, got 'pbm_b4'"),
        (["keep_last=null"], "keep_last must be an integer >= 1, got None"),
        (["model.mask_token_id=x"], "model.mask_token_id must be an integer >= 0 or null, got 'x'"),
        (["launch=slurm", "launch.nodes=two"], "launch.nodes must be an integer >= 1, got 'two'"),
        (
            ["stage.pbm_b4.warmup_steps=${name}"],
            "stage.pbm_b4.warmup_steps must be an integer >= 0 or null, got 'bard_b32'",
        ),
        (
            ["stage.pbm_b4.kind=recpie"],
            "stage.pbm_b4.kind must be one of recipe, convert, tiny, got 'recpie' (did you mean 'recipe'?)",
        ),
    ],
)
def test_hydra_refuses_on_one_line(words, line):
    with pytest.raises(ValueError, match=".") as error:
        composed(*words)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["launch.mode=one_jop"], "launch.mode must be one of one_job, per_stage, got 'one_jop'"),
        (["keep_last=0"], "keep_last must be an integer >= 1, got 0"),
        (["evaluation.pictures=-1"], "evaluation.pictures must be an integer >= 0, got -1"),
        (["model.context_attention=blok"], "model.context_attention must be one of block, causal, got 'blok'"),
        (["stage.pbm_b4=null"], "stage.pbm_b4 must be a section, got None"),
        (["+nmae=x"], "unknown key nmae; did you mean name?"),
    ],
)
def test_values_are_checked_when_the_chain_is_made(words, line):
    with pytest.raises(ValueError, match=".") as error:
        make_job(composed(*words))
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("kind: recipe\nrecipe: pbm\nmax_stesp: 3\n", "unknown key stage.polish.max_stesp in conf/stage/mine.yaml; did you mean stage.polish.max_steps?"),
        ("kind: recipe\nrecipe: pbm\nmax_steps: many\n", "stage.polish.max_steps must be an integer >= 1 or null, got 'many' in conf/stage/mine.yaml"),
        ("kind: recpie\n", "stage.polish.kind must be one of recipe, convert, tiny, got 'recpie' (did you mean 'recipe'?)"),
    ],
)  # fmt: skip
def test_files_are_checked_like_words(tmp_path, monkeypatch, text, line):
    chain = {"defaults": ["bard_b32", {"/stage@stage.polish": "mine"}, "_self_"], "order": ["start", "polish"]}
    for group, name, body in (
        ("stage", "mine", text),
        ("pipeline", "chain", "# @package _global_\n" + yaml.safe_dump(chain)),
    ):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / f"{name}.yaml").write_text(body)
    (tmp_path / "chain.yaml").write_text("recipe: nemo_bard.pipeline.Pipeline\npipeline: chain\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=".") as error:
        compose(read_words(tmp_path / "chain.yaml", ["data.path=x"]))
    assert str(error.value) == line


def test_free_sections_take_any_key_and_whole_sections():
    job = make_job(
        composed(
            "overrides={dataloader: {num_workers: 2}}",
            "stage.pbm_b4.overrides.noise.name=mixed",
            "stage.pbm_b8.overrides={noise: {name: mixed}}",
            "model.recipe.optimizer.eps=1e-6",
            "data.recipe.dataset.limit=5",
            "evaluation.generation.temperature=0.5",
            "+data.mine=4",
        )
    )
    for name in ("pbm_b4", "pbm_b8"):
        recipe = job.stage(name).recipe
        assert (recipe["dataloader"]["num_workers"], recipe["noise"]["name"]) == (2, "mixed")
        assert (recipe["optimizer"]["eps"], recipe["dataset"]["limit"]) == (1e-6, 5)
    assert job.evaluation.generation["temperature"] == 0.5


def test_stages_can_be_added_changed_and_removed_by_words():
    job = make_job(composed("+stage.extra.kind=tiny", "order=[extra,start,pbm_b4]", "model.source=null"))
    assert job.stage("start").inputs == {"init": "extra"}
    assert make_job(composed("~stage.pbm_b8", "order=[start,pbm_b4]")).names == ["start", "pbm_b4"]
    distilled = make_job(composed("+stage.pbm_b8.anchor=pbm_b4")).stage("pbm_b8")
    assert distilled.inputs == {"init": "pbm_b4", "anchor": "pbm_b4"}


def test_shipped_files_hold_every_setting_with_its_default():
    """The files and the classes are two places for a default; they say the same."""
    config = yaml.safe_load((conf_dir() / "config.yaml").read_text())
    plain = {"overrides": {}, "keep_last": 2, "allow_version_change": False}
    assert {key: config[key] for key in plain} == plain
    assert set(config) - {"defaults"} <= {field.name for field in dataclasses.fields(ChainSettings)}
    given = {key: value for key, value in config["evaluation"].items() if key not in ("data", "generation")}
    assert given.keys() == {field.name for field in dataclasses.fields(EvaluationSettings)} - {"data", "generation"}
    assert EvaluationSettings(**given) == EvaluationSettings()
    for name in ("pbm", "swd", "convert", "tiny"):
        section = yaml.safe_load((conf_dir() / "stage" / f"{name}.yaml").read_text())
        section.pop("defaults", None)
        section.setdefault("kind", "recipe")
        fields = {
            field.name: field for field in dataclasses.fields(STAGE_KINDS.get(section["kind"]).settings_for(section))
        }
        assert section.keys() <= fields.keys()
        for key, value in section.items():
            default = fields[key].default
            if key not in ("kind", "recipe", "block_size", "overrides"):
                assert value == default, f"{name}.{key}"


def test_the_reference_has_every_setting():
    for cls in (
        ModelSettings,
        EvaluationSettings,
        ChainSettings,
        *(STAGE_KINDS.get(name).Settings for name in STAGE_KINDS),
    ):
        table = reference(dataclasses.fields(cls))
        assert [line.split("`")[1] for line in table.splitlines()[2:]] == [
            field.name for field in dataclasses.fields(cls)
        ]


def test_a_settings_class_that_hydra_cannot_read_is_named():
    @dataclass
    class Odd:
        value: set = dataclasses.field(default_factory=set)

    with pytest.raises(ValueError, match=r"^stage.x: .*Odd: .*"):
        register(Schema({"": ChainSettings, "stage.x": Odd}))


def test_a_launcher_from_outside_has_typed_settings(tmp_path, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class DrySettings(LaunchSettings):
        hosts: list[str] = setting(factory=list, help="machines")
        rounds: int = setting(1, integer(), "how often")

    class DryLauncher(Launcher):
        Settings = DrySettings

    (tmp_path / "conf" / "launch").mkdir(parents=True)
    (tmp_path / "conf" / "launch" / "dry.yaml").write_text("name: dry\nhosts: [a, b]\n")
    monkeypatch.chdir(tmp_path)
    LAUNCHERS.register("dry", DryLauncher)
    try:
        launch = make_job(composed("launch=dry", "launch.rounds=2")).launch
        assert launch == DrySettings(name="dry", hosts=["a", "b"], rounds=2)
        with pytest.raises(ValueError, match=r"launch.rounds must be an integer >= 1, got 'x'"):
            composed("launch=dry", "launch.rounds=x")
    finally:
        LAUNCHERS.unregister("dry")
