"""A chain of two stub stages: skipped, killed anywhere, preempted, refused, reported."""

import copy
import errno
import gc
import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from pipeline_stub import EVERY, STEPS, KilledError, StubRecipe, tree, write_chain
from safetensors.torch import save_file
from torch import tensor

from nemo_bard.base.files import locked
from nemo_bard.base.metrics import read_lines
from nemo_bard.launch.exits import EXIT_PREEMPTED
from nemo_bard.pipeline import Pipeline, compare, manifest
from nemo_bard.pipeline.compose import compose, read_words
from nemo_bard.pipeline.job import make_job
from nemo_bard.pipeline.status import read_status, render
from nemo_bard.report.run import read_run


@pytest.fixture(scope="module", autouse=True)
def _fast():
    """Every run collects garbage twice; what is imported once need not be looked through."""
    import nemo_bard.train.swd  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    composed = {}

    def compose_once(words):
        key = json.dumps([words.overrides, [folder.name for folder in words.config_dirs], words.pipeline])
        composed[key] = composed.get(key) or compose(words)
        return copy.deepcopy(composed[key])

    monkeypatch.setattr("nemo_bard.pipeline.run.compose", compose_once)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    StubRecipe.events, StubRecipe.trained, StubRecipe.refs = {}, [], []


@pytest.fixture
def chain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_chain(tmp_path)


def run(*words):
    pipeline = Pipeline.from_overrides(Path("chain.yaml"), list(words))
    try:
        pipeline.setup()
        return pipeline.run_train_validation_loop()
    finally:
        pipeline._held.close()
        pipeline.world.stop.release()


@pytest.fixture
def no_report(monkeypatch):
    """Pictures take longer than a run; one test looks at them."""
    monkeypatch.setattr("nemo_bard.pipeline.run.write_report", lambda run_dir: (run_dir / "report.html").touch())


def weights(run_dir="runs/stub"):
    return {name: (Path(run_dir) / name / "export" / "model.safetensors").read_bytes() for name in "ab"}


@pytest.fixture
def undisturbed(chain, no_report):
    assert run("run_dir=whole") == 0
    StubRecipe.trained.clear()
    return weights("whole")


def test_a_run_leaves_exports_manifests_metrics_and_a_report(chain, capsys):
    assert run() == 0
    folder = chain / "runs" / "stub"
    for name, block in (("a", 4), ("b", 8)):
        manifest = json.loads((folder / name / "manifest.json").read_text())
        assert manifest["stage"] == name
        assert manifest["config"]["recipe"]["model"]["block_size"] == block
        assert manifest["versions"]["torch"]
        assert yaml.safe_load((folder / name / "stage.yaml").read_text())["model"]["block_size"] == block
        assert [entry["step"] for entry in read_lines(folder / name / "checkpoints" / "training.jsonl")] == list(
            range(5)
        )
    assert manifest["inputs"]["init"]["content"] == json.loads((folder / "a" / "manifest.json").read_text())["content"]
    assert yaml.safe_load((folder / "pipeline.yaml").read_text())["order"] == ["a", "b"]
    assert [record.name for record in read_run(folder)] == ["a", "b"]
    assert "data:image/png;base64," in (folder / "report.html").read_text()
    assert "| b | 8 | 5 |" in (folder / "report.md").read_text()
    status = read_status(folder)
    assert status.complete
    assert not status.needs_resume
    assert "[2/2] b: B = 8, 5 steps of 4 samples, from a" in capsys.readouterr().out


def test_finished_stages_are_skipped_and_nothing_is_written_again(chain):
    run()
    before = tree("runs/stub/a") | tree("runs/stub/b")
    StubRecipe.trained.clear()
    assert run() == 0
    assert StubRecipe.trained == []
    assert tree("runs/stub/a") | tree("runs/stub/b") == before


def test_nothing_of_a_finished_stage_stays_in_memory(chain):
    run()
    assert len(StubRecipe.refs) == 2
    assert all(ref() is None for ref in StubRecipe.refs)


PLACES = [(block, step, place) for block in (4, 8) for step in (0, 1, 2, 4) for place in ("step", "after")]
PLACES += [(block, step, "save") for block in (4, 8) for step in (1, 3, 4)]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_killed_anywhere_the_same_command_ends_with_the_same_weights(undisturbed, place):
    StubRecipe.events = {place: "kill"}
    with pytest.raises(KilledError):
        run()
    assert StubRecipe.events == {}
    assert read_status(Path("runs/stub")).needs_resume
    assert run() == 0
    assert weights() == undisturbed
    steps = [step for block, step in StubRecipe.trained if block == place[0]]
    assert len(steps) <= STEPS + EVERY, "the stage went on, it did not begin again"
    for name in "ab":
        log = read_lines(Path("runs/stub") / name / "checkpoints" / "training.jsonl")
        assert [(entry["step"], entry["loss"]) for entry in log] == [
            (entry["step"], entry["loss"])
            for entry in read_lines(Path("whole") / name / "checkpoints" / "training.jsonl")
        ]
        text = (Path("runs/stub") / name / "checkpoints" / "training.jsonl").read_text()
        assert len(text.splitlines()) == STEPS


@pytest.mark.parametrize("where", ["write_json", "link_export", "fingerprint"])
def test_killed_while_a_stage_is_being_finished(undisturbed, monkeypatch, where):
    real = getattr(manifest, where)

    def dying(path, *rest):
        if where != "write_json" or path.name == manifest.MANIFEST:
            raise KilledError
        return real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, where, dying)
        with pytest.raises(KilledError):
            run()
    assert not Path("runs/stub/a/manifest.json").exists()
    StubRecipe.trained.clear()
    assert run() == 0
    assert weights() == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("place", [(4, 2, "step"), (4, 4, "step"), (8, 0, "step")], ids=str)
def test_preempted_with_a_checkpoint_and_its_own_exit_code(undisturbed, number, place, capsys):
    StubRecipe.events = {place: number}
    assert run() == EXIT_PREEMPTED
    assert "run the same command again" in capsys.readouterr().out
    done = len(StubRecipe.trained)
    status = read_status(Path("runs/stub"))
    assert status.needs_resume
    assert sum(stage.steps or 0 for stage in status.stages) == done
    assert "run the same command again" in render(status, Path("runs/stub"))
    assert run() == 0
    assert weights() == undisturbed
    assert len(StubRecipe.trained) == 2 * STEPS, "no step was lost and none was done twice"
    assert done < 2 * STEPS


def test_signal_handlers_are_given_back(chain):
    before = signal.getsignal(signal.SIGTERM)
    run()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("stage.a.max_steps=6",),
            "stage a was finished with step_scheduler.max_steps=5, now it is 6; use another run_dir",
        ),
        (("overrides.optimizer.lr=0.2",), "stage a was finished with optimizer.lr=0.1, now it is 0.2"),
    ],
)
def test_changed_config_is_refused_and_nothing_overwritten(chain, words, message):
    run()
    before = tree("runs/stub/a") | tree("runs/stub/b")
    with pytest.raises(ValueError, match=message):
        run(*words)
    assert tree("runs/stub/a") | tree("runs/stub/b") == before


def test_changed_config_of_a_stage_that_has_begun_is_refused(chain):
    StubRecipe.events = {(4, 3, "step"): "kill"}
    with pytest.raises(KilledError):
        run()
    with pytest.raises(ValueError, match=r"stage a was begun with optimizer.lr=0.1, now it is 0.3"):
        run("overrides.optimizer.lr=0.3")


def test_what_does_not_change_the_result_may_change(chain):
    StubRecipe.events = {(4, 3, "step"): "kill"}
    with pytest.raises(KilledError):
        run()
    assert run("stage.a.ckpt_every_steps=1", "keep_last=5", "overrides.dataloader.num_workers=2") == 0


def test_changed_versions_and_inputs_are_refused(chain, monkeypatch):
    run()
    with monkeypatch.context() as patch:
        patch.setattr(compare, "versions", lambda: {"torch": "0.1"})
        with pytest.raises(ValueError, match=r"stage a was finished with torch 2[.\d+\w]+, now 0.1; set allow_version"):
            run()
        assert run("allow_version_change=true") == 0
    save_file({"weight": tensor([2.0])}, chain / "start" / "model.safetensors")
    with pytest.raises(ValueError, match="stage a was finished with another content of its init"):
        run()


def test_another_name_on_the_hub_is_another_start(chain):
    stage = make_job(compose(read_words(Path("chain.yaml"), ["stage.a.init=org/one"]))).stages[0]
    other = make_job(compose(read_words(Path("chain.yaml"), ["stage.a.init=org/two"])))
    configs = [compare.compared_config(s, other) for s in (stage, other.stages[0])]
    assert compare.first_difference(*configs) == ("named.init", "org/one", "org/two")


def test_a_data_file_is_read_once(chain, monkeypatch):
    read = []
    monkeypatch.setattr(manifest, "hash_file", lambda path: read.append(path) or "0")
    (chain / "data.txt").write_text("x")
    known = manifest.fingerprint(chain / "data.txt")
    assert manifest.fingerprint(chain / "data.txt", known) == known
    assert read == [chain / "data.txt"]
    (chain / "data.txt").write_text("xy")
    manifest.fingerprint(chain / "data.txt", known)
    assert len(read) == 2


def test_damaged_export_is_named(chain):
    run()
    export = Path("runs/stub/a/export/model.safetensors")
    save_file({"weight": tensor([7.0])}, "other.safetensors")
    Path("other.safetensors").replace(export)
    with pytest.raises(ValueError, match="export/model.safetensors is not what the stage wrote"):
        run()
    export.unlink()
    with pytest.raises(ValueError, match="export/model.safetensors is missing"):
        run()


@pytest.mark.parametrize("damage", ["truncate", "marker", "empty"])
def test_damaged_checkpoint_is_named_and_an_older_one_used(undisturbed, caplog, damage):
    StubRecipe.events = {(4, 4, "step"): "kill"}
    with pytest.raises(KilledError):
        run()
    newest = Path("runs/stub/a/checkpoints/epoch_0_step_3")
    if damage == "truncate":
        shard = newest / "model" / "shard.safetensors"
        shard.write_bytes(shard.read_bytes()[:-2])
    elif damage == "marker":
        (newest / ".incomplete").touch()
    else:
        (newest / "step_scheduler.pt").write_bytes(b"")
    StubRecipe.trained.clear()
    assert run() == 0
    assert f"checkpoint not used: {newest.absolute()}" in caplog.text
    assert StubRecipe.trained[0] == (4, 2)
    assert weights() == undisturbed


def test_marker_is_the_one_that_upstream_writes():
    from nemo_automodel.components.checkpoint import utils

    assert utils._INCOMPLETE_CHECKPOINT_MARKER == manifest.INCOMPLETE


def test_run_directory_of_another_pipeline_or_of_nobody_is_refused(chain):
    run()
    with pytest.raises(ValueError, match="belongs to the pipeline stub, not other"):
        run("name=other", "run_dir=runs/stub")
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"mine holds thesis.tex and is no run of a pipeline"):
        run("run_dir=mine")
    with pytest.raises(ValueError, match="has no pipeline.json"):
        read_status(Path("mine"))


def test_two_runs_do_not_share_a_directory(chain, monkeypatch):
    monkeypatch.setattr("nemo_bard.base.files.LOCK_WAIT_SECONDS", 0.0)
    with locked(Path("runs/stub")), pytest.raises(ValueError, match=r"in use by another run \(process \d+ on"):
        run()
    assert run() == 0


def test_without_locks_a_chain_runs_and_its_status_is_not_guessed(chain, monkeypatch, no_report):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    StubRecipe.events = {(8, 3, "step"): "kill"}
    with pytest.raises(KilledError):
        run()
    fresh = read_status(Path("runs/stub"))
    assert (fresh.running, fresh.needs_resume) == (True, False)
    monkeypatch.setattr("nemo_bard.pipeline.status.FRESH_SECONDS", 0.0)
    status = read_status(Path("runs/stub"))
    assert (status.running, status.needs_resume) == (None, None)
    assert [stage.state for stage in status.stages] == ["finished", "unknown"]
    told = render(status, Path("runs/stub"))
    assert "last news 0 s ago" in told
    assert told.endswith("unknown whether it is running: this file system has no locks\n")
    StubRecipe.events = {}
    assert run() == 0
    assert read_status(Path("runs/stub")).complete


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_what_the_system_refuses_at_the_start_is_one_line(chain, capsys, monkeypatch, number):
    from nemo_bard.cli.app import main

    def refused(*_, **__):
        raise OSError(number, os.strerror(number), "runs/stub/pipeline.json")

    monkeypatch.setattr("nemo_bard.pipeline.run.write_json", refused)
    assert main(["finetune", "--config", "chain.yaml"]) == 2
    line = f"run_dir {Path('runs/stub').absolute()} cannot be used: {os.strerror(number)} (runs/stub/pipeline.json)"
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_run_directory_can_be_moved(chain):
    run()
    Path("runs/stub").rename("elsewhere")
    StubRecipe.trained.clear()
    assert run("run_dir=elsewhere") == 0
    assert StubRecipe.trained == []


def test_a_begun_stage_goes_on_with_other_processes_and_local_batches(undisturbed):
    StubRecipe.events = {(4, 3, "step"): "kill"}
    with pytest.raises(KilledError):
        run()
    file = Path("runs/stub/a/started.json")
    file.write_text(file.read_text().replace('"processes": 1', '"processes": 2'))
    assert run("stage.a.local_batch_size=1") == 0
    assert StubRecipe.trained[:4] == [(4, 0), (4, 1), (4, 2), (4, 2)], "from the checkpoint on"
    assert weights() == undisturbed
    started = json.loads(file.read_text())
    assert (started["processes"], started["local_batch_size"]) == (1, 1)
    with pytest.raises(ValueError, match="stage a was finished with step_scheduler.global_batch_size=4, now it is 8"):
        run("stage.a.global_batch_size=8")


def test_a_recipe_that_counts_per_process_goes_on_with_as_many(chain, monkeypatch):
    monkeypatch.setattr(StubRecipe, "any_ranks", False)
    StubRecipe.events = {(4, 3, "step"): "kill"}
    with pytest.raises(KilledError):
        run()
    with pytest.raises(
        ValueError, match="stage a was begun with local_batch_size=2, now it is 1; its recipe, .*StubRecipe, "
    ):
        run("stage.a.local_batch_size=1")
    file = Path("runs/stub/a/started.json")
    file.write_text(file.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(ValueError, match="stage a was begun with processes=2, now it is 1; its recipe, "):
        run()
    file.write_text(file.read_text().replace('"processes": 2', '"processes": 1'))
    assert run() == 0


def test_a_local_batch_that_an_earlier_version_compared_is_not_compared(chain):
    assert run() == 0
    file = Path("runs/stub/a/manifest.json")
    record = json.loads(file.read_text())
    assert "local_batch_size" not in record["config"]["recipe"]["step_scheduler"]
    record["config"]["recipe"]["step_scheduler"]["local_batch_size"] = 4
    file.write_text(json.dumps(record))
    StubRecipe.trained.clear()
    assert run() == 0
    assert StubRecipe.trained == []


def test_stages_one_by_one_give_the_same_files(undisturbed):
    for part in ("a", "b", "report"):
        assert run(f"--stage={part}", "run_dir=parts") == 0
    assert weights("parts") == undisturbed
    assert read_status(Path("parts")).complete
    with pytest.raises(ValueError, match="stage b needs the export of stage a, which is not finished"):
        run("--stage=b", "run_dir=new")


def test_status_of_a_running_stage(chain, monkeypatch):
    seen = []

    def look(self, place):
        if (self.block, self.step_scheduler.step, place) == (8, 3, "step"):
            seen.append(read_status(Path("runs/stub")))

    monkeypatch.setattr(StubRecipe, "happen", look)
    run()
    assert [stage.state for stage in seen[0].stages] == ["finished", "running"]
    assert seen[0].running
    assert not seen[0].needs_resume
    assert "running" in render(seen[0], Path("runs/stub"))


def test_all_stages_share_what_is_known_of_the_data(chain, no_report, monkeypatch):
    caches, setup = [], StubRecipe.setup

    def noted(self):
        caches.append(self.data_cache)
        setup(self)

    monkeypatch.setattr(StubRecipe, "setup", noted)
    run()
    assert caches == [Path("runs/stub/lengths").absolute()] * 2


def test_no_step_waits_for_the_disk_to_tell_the_progress(chain, no_report, monkeypatch):
    written = []

    def write(path, value, *, durable=True):
        written.append((path.name, durable))

    monkeypatch.setattr("nemo_bard.pipeline.training.write_json", write)
    monkeypatch.setattr("nemo_bard.pipeline.training.PROGRESS_SECONDS", 0.0)
    run()
    assert set(written) == {("progress.json", False)}
    assert len(written) >= 2 * STEPS


def test_where_no_bar_can_be_drawn_there_are_lines(chain, no_report, capsys, monkeypatch):
    monkeypatch.setattr("nemo_bard.pipeline.training.LINE_SECONDS", 0.0)
    run()
    told = capsys.readouterr().out
    for stage in "ab":
        for step in range(1, STEPS + 1):
            assert f"      {stage}: step {step}/{STEPS}, loss " in told
    assert " left\n" in told


@pytest.fixture
def slurm(chain, monkeypatch):
    """A Slurm of programs that write down what they are asked."""
    folder = chain / "bin"
    folder.mkdir()
    for name, body in {
        "sinfo": 'echo "cpu*"', "sbatch": "echo sbatch >>$(dirname $0)/calls; echo 77",
        "squeue": 'echo "PENDING Resources"',
    }.items():  # fmt: skip
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_a_world_that_does_not_fit_is_refused_before_anything_starts(slurm, capsys, monkeypatch):
    from nemo_bard.cli.app import main

    monkeypatch.setattr("nemo_bard.launch.local.run_torchrun", lambda *_, **__: pytest.fail("torchrun"))
    line = (
        "error: stage a: step_scheduler.global_batch_size=4 must be divisible by step_scheduler.local_batch_size=2"
        " times 3 data-parallel rank(s)\n"
    )
    for words in (["--nproc-per-node", "3"], ["launch.processes=3"], ["launch=slurm", "launch.nodes=3"]):
        assert main(["finetune", "--config", "chain.yaml", *words]) == 2
        assert capsys.readouterr().err == line
    assert main(["finetune", "--config", "chain.yaml", "--cfg", "launch=slurm", "launch.nodes=3"]) == 2
    assert capsys.readouterr().err == line
    assert not Path("runs").exists()
    assert not (slurm / "calls").exists()


def test_status_of_a_job_in_the_queue(slurm, no_report, capsys):
    from nemo_bard.cli.app import main

    command = ["finetune", "--config", "chain.yaml", "launch=slurm", "launch.nodes=2"]
    assert main([*command, "launch.partition=gpu"]) == 2
    assert "no partition 'gpu'" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert main(command) == 0
    status = read_status(Path("runs/stub"))
    assert (status.job, status.queue, status.running, status.needs_resume) == (
        "77",
        "PENDING (Resources)",
        False,
        False,
    )
    assert "Slurm job 77: PENDING (Resources); it goes on by itself" in render(status, Path("runs/stub"))
    (slurm / "squeue").write_text("#!/bin/bash\necho RUNNING None\n")
    assert "running; Slurm job 77: RUNNING" in render(read_status(Path("runs/stub")), Path("runs/stub"))
    (slurm / "squeue").write_text("#!/bin/bash\nexit 1\n")
    assert read_status(Path("runs/stub")).needs_resume
    assert run() == 0, "the run directory is that of the job"
    assert read_status(Path("runs/stub")).complete


def test_finetune_stops_before_it_starts_processes(chain, capsys):
    from nemo_bard.cli.app import main

    assert main(["finetune", "--config", "chain.yaml", "stage.a.block_size=16"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: stage.b.block_size=8 must be larger than 16")
    assert error.count("\n") == 1
    assert main(["finetune", "--config", "chain.yaml", "--cfg"]) == 0
    printed = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [part.get("model", {}).get("block_size") for part in printed[1:]] == [4, 8]
    assert not Path("runs").exists()
