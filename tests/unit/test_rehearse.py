"""The rehearsal of a chain: what it runs, what it finds, what it says, and that nothing of it stays."""

import copy
import errno
import fcntl
import gc
import importlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pipeline_stub import StubRecipe, tree, write_chain

from nemo_bard.base.paths import conf_dir, find_recipe
from nemo_bard.cli.app import main
from nemo_bard.data.chosen import ChosenSamples, make_chosen
from nemo_bard.data.collate import Outline
from nemo_bard.data.lengths import UNKNOWN_LENGTH, SampleSizes
from nemo_bard.launch import slurm
from nemo_bard.launch.exits import EXIT_PREEMPTED
from nemo_bard.launch.local import LocalLauncher
from nemo_bard.pipeline.compose import compose, read_words
from nemo_bard.pipeline.job import make_job
from nemo_bard.pipeline.rehearse import advice, probes, rows
from nemo_bard.pipeline.rehearse.derive import Rehearsed, rehearsal_job, rehearsed_stage
from nemo_bard.pipeline.rehearse.failures import explain
from nemo_bard.pipeline.rehearse.findings import Findings, SlowRank, StageFindings, find_slow, needed_gib, trained
from nemo_bard.pipeline.rehearse.predict import Machine, predict
from nemo_bard.pipeline.rehearse.probes import FileFindings, NetworkFindings
from nemo_bard.pipeline.rehearse.report import render
from nemo_bard.pipeline.rehearse.rows import Rows, SampleShape
from nemo_bard.pipeline.rehearse.watch import Measured, Step, rate
from nemo_bard.pipeline.world import World

RECIPE = {
    "step_scheduler": {"global_batch_size": 8, "local_batch_size": 1, "max_steps": 100, "ckpt_every_steps": 10},
    "dataloader": {"collate_fn": {"_target_": "nemo_bard.data.BlockDiffusionCollator", "max_length": 100}},
    "distributed": {},
}
ROWS = Rows(total=10, measured=10, too_long=0, longest=96, typical=80.0, longest_sample=None, typical_sample=None)
FACTS = Rehearsed(
    name="a", max_steps=100, ckpt_every_steps=10, global_batch_size=8, local_batch_size=1, microbatches=4, rehearsed=2,
    recipe=RECIPE,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    StubRecipe.events, StubRecipe.trained, StubRecipe.refs = {}, [], []


# ------------------ which samples ------------------
def part(lengths):
    """Samples of one prompt token and a response, so that their rows with B = 1 take twice its length."""
    order = np.random.default_rng(0).permutation(len(lengths))
    sizes = SampleSizes.from_outlines([Outline([(1, 1 + lengths[i])], [(0, 1)]) for i in order])
    return rows.Measured(len(lengths), order[:0], order, sizes)


def test_the_longest_rows_that_fit_come_first_and_typical_ones_after_them():
    measured = part([3, 50, 20, 60, 10])
    indices, known = rows.choose(measured, RECIPE, 1, anchor_block_size=None, samples=4)
    assert indices[:2] == [1, 2], "a row of 120 tokens is dropped in training too"
    assert sorted(indices[2:]) == [0, 1, 2, 3, 4]
    assert (known.longest, known.too_long, known.measured, known.total) == (100, 1, 5, 5)
    assert known.longest_sample == SampleShape(prompt_tokens=1, image_tokens=1, response_tokens=50)
    assert known.typical == np.mean([6, 100, 40, 20])


def test_samples_come_again_where_there_are_few_and_unreadable_ones_are_met_at_once():
    measured = rows.Measured(
        3, np.arange(0), np.arange(3),
        SampleSizes.from_outlines([Outline([(1, 5)], []), Outline([(0, UNKNOWN_LENGTH)], []), Outline([(1, 3)], [])]),
    )  # fmt: skip
    indices, known = rows.choose(measured, RECIPE, 1, anchor_block_size=None, samples=8)
    assert indices == [0, 2, 0, 2, 1, 0, 2, 1]
    assert known.too_long == 0


def test_packed_rows_are_full_and_there_are_samples_for_them():
    recipe = {**RECIPE, "packing": {"max_length": 64}}
    indices, known = rows.choose(part([8] * 20), recipe, 1, anchor_block_size=None, samples=8)
    assert known.longest == 64
    assert len(indices) >= 8 * 64 / 16


def test_what_cannot_be_measured_is_said(tmp_path):
    recipe = {"dataset": {"_target_": "nemo_bard.data.make_digits", "num_samples": 5}, "dataloader": {}}
    measured = rows.measure_part(recipe, tmp_path, None)
    indices, known = rows.choose(measured, recipe, None, anchor_block_size=None, samples=4)
    assert set(indices) <= set(range(5))
    assert (known.measured, known.longest, known.total) == (0, None, 5)


def test_of_a_large_file_the_longest_lines_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MEASURED", 4)
    monkeypatch.setattr(rows, "HEAVY", 1)
    lines = [{"messages": [{"role": "user", "content": "x" * (500 if i == 7 else 9)}]} for i in range(10)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {"dataset": {"_target_": "nemo_bard.data.JsonlDataset", "path": str(file)}}
    measured = rows.measure_part(recipe, tmp_path, None)
    assert measured.heavy.tolist() == [7]
    assert len(measured.random) == 3
    assert 7 not in measured.random


def test_chosen_samples_name_those_of_the_data_set(tmp_path):
    section = {"_target_": "nemo_bard.data.make_digits", "num_samples": 5}
    file = tmp_path / "indices.json"
    file.write_text("[4, 0, 4]")
    data = make_chosen(section, str(file))
    assert [data[i]["sample_index"] for i in range(3)] == [4, 0, 4]
    assert data.peek(1)["sample_index"] == 0
    assert data.describe(0)["source"] == "DigitsDataset[4]"
    assert data.fingerprint() != ChosenSamples(data.dataset, [0, 4, 4]).fingerprint()
    with pytest.raises(ValueError, match="sample 5 is outside a data set of 5 samples"):
        ChosenSamples(data.dataset, [5])


# ------------------ the chain that is run ------------------
def test_two_steps_of_the_real_stages_in_another_folder(tmp_path):
    words = ["order=[tiny,start,pbm_b4,swd_b32]", f"run_dir={tmp_path / 'run'}", "stage.pbm_b4.global_batch_size=64",
             "overrides.step_scheduler.max_steps=70"]  # fmt: skip
    job = make_job(compose(read_words(find_recipe("bard_tiny"), words)))
    facts = {stage.name: rehearsed_stage(stage, 1, None) for stage in job.stages if stage.trains}
    derived = rehearsal_job(job, tmp_path / "scratch", facts)
    assert derived.evaluation.limit == 2
    for stage, real in zip(derived.stages, job.stages, strict=True):
        assert stage.folder == tmp_path / "scratch" / stage.name
        assert real.folder == tmp_path / "run" / stage.name
        if not stage.trains:
            continue
        steps = stage.recipe["step_scheduler"]
        assert (steps["max_steps"], steps["ckpt_every_steps"]) == (2, 1)
        assert stage.recipe["dataset"]["dataset"] == real.recipe["dataset"]
        assert stage.recipe["dataloader"]["shuffle"] is False
        assert stage.recipe["dataloader"]["num_workers"] == real.recipe["dataloader"]["num_workers"]
        assert stage.recipe["model"].items() >= {"block_size": stage.block_size}.items()
    assert facts["pbm_b4"].max_steps == 70
    assert derived.stage("pbm_b4").recipe["step_scheduler"]["global_batch_size"] == 64
    assert derived.stage("pbm_b4").recipe["lr_scheduler"]["lr_warmup_steps"] == 1


def test_a_long_step_gets_fewer_microbatches(tmp_path):
    words = ["order=[tiny,start,pbm_b4]", f"run_dir={tmp_path}", "stage.pbm_b4.global_batch_size=256"]
    job = make_job(compose(read_words(find_recipe("bard_tiny"), words)))
    for seconds, kept in [(None, 8), (10.0, 32), (240.0, 8), (1e6, 2)]:
        facts = rehearsed_stage(job.stage("pbm_b4"), 1, seconds)
        assert (facts.microbatches, facts.rehearsed) == (32, kept)
        assert facts.samples == 2 * 8 * kept


# ------------------ the machines ------------------
def test_a_file_system_without_lock_and_links_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "PROBED_MIB", 1)
    found = probes.probe_files(World(), tmp_path)[0]
    assert (found.lock, found.rename, found.hard_links, found.lock_is_shared) == ("ok", "ok", "ok", None)
    assert found.fsync_ms > 0
    assert found.free_gib > 0

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "link", refuse)
    found = probes.probe_files(World(), tmp_path)[0]
    assert found.lock == found.hard_links == "Function not implemented"
    assert list(tmp_path.iterdir()) == []
    assert probes.probe_network(World()) is None


def test_batches_that_workers_had_begun_together_do_not_count():
    assert rate([0.0, 1.0, 2.0], 0) == 1.0
    assert rate([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0], 3) == pytest.approx(2.0)
    assert rate([1.0], 0) == 0.0


# ------------------ what was found ------------------
def step(seconds=1.0, tokens=100, waiting=0.0, memory=1.0):
    return Step(
        seconds=seconds, whole_seconds=seconds, tokens=tokens, row_length=96, memory_gib=memory, waiting=waiting
    )


def test_a_rank_is_slow_only_if_it_has_no_more_to_do():
    slow = find_slow([step(waiting=0.7), step(waiting=0.1), step(waiting=0.7)], ["n1", "n2", "n2"])
    assert slow == SlowRank(rank=1, node="n2", share=pytest.approx(0.6), factor=pytest.approx(2.5))
    assert find_slow([step(waiting=0.7), step(waiting=0.1, tokens=300)], ["n1", "n2"]) is None
    assert find_slow([step(waiting=0.2), step(waiting=0.1)], ["n1", "n2"]) is None
    assert find_slow([step(waiting=None)], ["n1"]) is None


def test_a_step_is_scaled_to_all_its_microbatches():
    told = [
        Measured(steps=[step(9.0), step(2.0, waiting=0.9)], save_seconds=[3.0, 4.0], rows_per_second=10.0, loaded=7),
        Measured(steps=[step(9.0), step(2.0, tokens=190, memory=5.0)], save_seconds=[1.0], rows_per_second=4.0),
    ]
    found = trained("a", told, FACTS, rows=ROWS, nodes=["n", "n"], seconds=30.0)
    assert found.step_seconds == 4.0
    assert found.memory_gib == 5.0
    assert (found.rows_needed, found.rows_given, found.rows_read) == (2.0, 8.0, 7)
    assert found.waiting == pytest.approx(0.45)
    assert found.days == pytest.approx((100 * 4.0 + 10 * 4.0) / 86400)


def test_the_chain_writes_kept_checkpoints_and_exports():
    stages = [StageFindings(name="start", seconds=1.0, export_gib=1.0),
              StageFindings(name="a", seconds=1.0, checkpoint_gib=3.0, export_gib=1.0)]  # fmt: skip
    assert needed_gib(stages, [FACTS], keep_last=2, links=True) == 1 + 2 * 3 + 1 + 3
    assert needed_gib(stages, [FACTS], keep_last=2, links=False) == 1 + 2 * 3 + 2 + 3
    assert needed_gib(stages, [replace(FACTS, ckpt_every_steps=100)], keep_last=2, links=True) == 1 + 3 + 1 + 3


def findings(*, took=0.0, **changed):
    stage = StageFindings(
        name="a", seconds=60.0, rows=ROWS, memory_gib=79.0, predicted_memory_gib=70.0, step_seconds=4.0,
        predicted_step_seconds=3.5, longest_row=96, row_tokens=80.0, microbatches=4, rehearsed_microbatches=2,
        rows_needed=2.0, rows_given=80.0, checkpoint_gib=3.0, export_gib=1.0, resumed=True, max_steps=100, days=2.0,
    )  # fmt: skip
    files = [FileFindings(node="n1", sees_folder=True, free_gib=100.0, fsync_ms=1.0, write_mib_s=500.0)]
    stage = replace(stage, **{key: value for key, value in changed.items() if hasattr(stage, key)})
    whole = {key: value for key, value in changed.items() if not hasattr(stage, key)}
    return Findings(**{
        "pipeline": "chain", "run_dir": "runs/x", "ranks": 2, "nodes": ["n1"], "device": "NVIDIA H100 80GB HBM3",
        "memory_gib": 80.0, "stages": [stage], "files": files, "needed_gib": 10.0, "seconds": took, **whole,
    })  # fmt: skip


def test_a_good_chain_has_nothing_to_change_but_short_memory():
    assert advice.find_error(findings()) is None
    assert advice.find_changes(findings(memory_gib=80.0), [FACTS])[0].startswith("a: memory is short (80 of 80 GiB): ")
    good = findings()
    good.stages = [replace(good.stages[0], memory_gib=40.0)]
    assert advice.find_changes(good, [FACTS]) == []


@pytest.mark.parametrize(
    ("changed", "recipe", "line"),
    [
        ({"rows": replace(ROWS, typical=30.0)}, {}, "a: a row is 30 of 100 tokens on average: overrides.packing.max_length=100"),
        ({"waiting": 0.4}, {}, "a: ranks wait 40% of a step for the longest row"),
        ({"rows_given": 0.1}, {"dataloader": {**RECIPE["dataloader"], "num_workers": 1000}},
         "a: the loader gives 0.1 rows/s, the steps take 2.0"),
        ({"nodes": ["n1", "n2"], "ranks": 16}, {}, "a: weights are gathered across nodes: overrides.distributed.dp_replicate"),
        ({"save_seconds": 40.0}, {}, "a: checkpoints take 50% of the time: ckpt_every_steps=20"),
        ({"slow_rank": SlowRank(rank=3, node="n7", share=0.3, factor=2.0)}, {}, "a: rank 3 (node n7) is too slow"),
        ({"files": [FileFindings(node="n1", sees_folder=True, lock="No locks available")]}, {}, "no lock (No locks available)"),
        ({"files": [FileFindings(node="n1", sees_folder=True, hard_links="no")]}, {}, "no hard links (no)"),
        ({"files": [FileFindings(node="n1", sees_folder=True), FileFindings(node="n2", sees_folder=True, lock_is_shared=False)]},
         {}, "locks of other nodes are not seen on n2"),
    ],
)  # fmt: skip
def test_what_to_change(changed, recipe, line):
    found = findings(**changed)
    found.stages = [replace(found.stages[0], memory_gib=1.0)]
    lines = advice.find_changes(found, [replace(FACTS, recipe={**RECIPE, **recipe})])
    assert any(one.startswith(line) for one in lines), lines


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"needed_gib": 200.0}, "disk too small: the chain will write 200.0 GiB, .* has 100.0 GiB free"),
        ({"files": [FileFindings(node="n2", sees_folder=False)]}, "node n2 does not see the folder of run_dir runs/x"),
        ({"files": [FileFindings(node="n2", sees_folder=True, rename="no", free_gib=99.0)]}, "cannot replace a file at once"),
        ({"slow_rank": SlowRank(rank=3, node="n7", share=0.6, factor=9.0)}, r"stage a: rank 3 \(node n7\) is too slow"),
    ],
)  # fmt: skip
def test_what_makes_the_run_fail(changed, line):
    with pytest.raises(ValueError, match=line):
        raise ValueError(advice.find_error(findings(**changed)))


def test_less_memory_names_what_is_not_set_yet():
    assert "defer_fsdp_grad_sync: false" in advice.less_memory(RECIPE, 2)
    assert "defer_fsdp_grad_sync" not in advice.less_memory(RECIPE, 8), "one microbatch has nothing to defer"
    recipe = {**RECIPE, "distributed": {"activation_checkpointing": True, "defer_fsdp_grad_sync": False}}
    assert advice.less_memory(recipe, 2) == "shorter rows (dataloader.collate_fn.max_length)"


def test_the_report_is_a_short_table():
    network = NetworkFindings(backend="nccl", ranks=2, nodes=1, allreduce_ms=3.0, bus_gb_s=40.0, latency_ms=0.02)
    found = findings(network=network, took=125.0, changes=["a: less"])
    lines = render(found).splitlines()
    assert lines[0] == "rehearsal of chain: 2 processes, NVIDIA H100 80GB HBM3, took 2 min 5 s"
    assert lines[2].split() == ["stage", "longest", "typical", "GiB", "plan", "s/step", "plan", "rows/s", "loader", "to", "the", "end"]  # fmt: skip
    assert lines[3].split() == ["a", "96", "80", "79.0", "70.0", "4.00", "3.50", "2.0", "80.0", "2.0", "days"]
    assert "  a: 2 of 4 microbatches of a step were run" in lines
    assert any(line.startswith("network   nccl, 2 ranks: all-reduce of 64 MiB 3.0 ms (40.0 GB/s)") for line in lines)
    assert lines[-1] == "  - a: less"
    assert max(map(len, lines)) <= 120
    assert json.loads(json.dumps(found.as_dict()))["days"] == 2.0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory on rank 3 .* in step 1 of 2 with rows of 8192 tokens; change x"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory on rank 3"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk too small: No space left on device in runs"),
        (ValueError("a\nb"), "^a b$"),
    ],
)  # fmt: skip
def test_failures_are_one_line(error, line):
    told = explain(error, stage="s", measured=Measured(row_length=8192), rank=3, lower="x", folder=Path("runs"))
    with pytest.raises(ValueError, match=line):
        raise ValueError(told)


def test_a_mistake_in_the_program_is_no_line():
    assert explain(KeyError("x"), stage="s", measured=Measured(), rank=0, lower="", folder=Path()) is None


def test_what_plan_expects(tmp_path):
    from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

    source = make_tiny_qwen3_vl(tmp_path / "tiny")
    recipe = {**RECIPE, "model": {"block_size": 4}, "loss_fn": {}, "noise": {}}
    shape = SampleShape(prompt_tokens=20, image_tokens=4, response_tokens=30)
    known = replace(ROWS, longest_sample=shape, typical_sample=shape)
    cpu = predict(recipe, source, None, rows=known, machine=Machine("CPU", 16.0, 1, 1))
    assert cpu.step_seconds is None
    assert cpu.memory_gib is not None
    gpu = predict(recipe, source, None, rows=known, machine=Machine("NVIDIA H100 80GB HBM3", 79.0, 8, 8))
    assert gpu.step_seconds is not None
    longer = replace(known, longest=4000, longest_sample=replace(shape, prompt_tokens=3000))
    more = predict(recipe, source, None, rows=longer, machine=Machine("NVIDIA H100 80GB HBM3", 79.0, 8, 8))
    assert more.memory_gib > gpu.memory_gib
    assert more.step_seconds == gpu.step_seconds
    assert predict(recipe, source, None, rows=ROWS, machine=Machine("CPU", 16.0, 1, 1)).memory_gib is None


# ------------------ how it is started ------------------
def test_a_slurm_job_is_short_comes_once_and_tidies_up(tmp_path):
    section = yaml.safe_load((conf_dir() / "launch" / "slurm.yaml").read_text())
    real = slurm.SlurmSettings(
        **{**section, "job_name": "x", "folder": str(tmp_path / "run" / "slurm"), "mode": "per_stage", "rehearse": True}
    )
    scratch = tmp_path / "run.rehearsal-ab12"
    settings = slurm.SlurmLauncher().rehearsal(real, scratch)
    text = slurm.script(settings, [], find_recipe("bard_tiny"), [f"--scratch={scratch}"], None)
    slurm.check(settings)
    for line in (
        "--no-requeue",
        "--time=00:30:00",
        "--job-name=x-rehearsal",
        f"--output={tmp_path}/run.rehearsal/%j.log",
    ):
        assert f"#SBATCH {line}\n" in text
    assert f"trap 'rm -rf -- {scratch}' EXIT\n" in text
    assert 'run_nodes ""' in text
    assert "#SBATCH --requeue" not in text
    assert "#SBATCH --requeue" in slurm.script(replace(real, rehearse=False), [], find_recipe("bard_tiny"), [], None)


def test_workers_that_could_not_tidy_up_are_tidied_up_after(tmp_path, monkeypatch, capsys):
    started = []

    def start(self, settings, stages, config_path, words, processes):
        scratch = Path(next(word for word in words if word.startswith("--scratch=")).removeprefix("--scratch="))
        scratch.mkdir(parents=True)
        started.append((settings, scratch))
        return 1

    monkeypatch.setattr(LocalLauncher, "start", start)
    run_dir = tmp_path / "run"
    assert main(["rehearse", "--config", "bard_tiny", f"run_dir={run_dir}", "launch.mode=per_stage"]) == 1
    settings, scratch = started[0]
    assert (settings.mode, settings.grace_seconds, settings.rehearse) == ("one_job", 30, True)
    assert scratch.parent == tmp_path
    assert scratch.name.startswith("run.rehearsal-")
    assert list(tmp_path.iterdir()) == []


def test_only_a_chain_can_be_rehearsed(capsys):
    assert main(["rehearse", "--config", "pbm"]) == 2
    assert "pbm.yaml is no chain of stages" in capsys.readouterr().err


# ------------------ a whole chain of stub stages ------------------
COMPOSED = {}


def compose_once(words):
    key = json.dumps([words.overrides, words.pipeline])
    COMPOSED[key] = COMPOSED.get(key) or compose(words)
    return copy.deepcopy(COMPOSED[key])


@pytest.fixture
def chain(tmp_path, monkeypatch):
    importlib.import_module("nemo_bard.train.swd")

    COMPOSED.clear()
    gc.freeze()  # every stage collects garbage; what is imported once need not be looked through
    monkeypatch.setattr("nemo_bard.pipeline.run.compose", compose_once)
    monkeypatch.setattr("nemo_bard.pipeline.run.write_report", lambda run_dir: (run_dir / "report.html").touch())
    monkeypatch.setattr("nemo_bard.pipeline.rehearse.run.write_report", lambda run_dir: None)
    monkeypatch.setattr(probes, "PROBED_MIB", 1)
    monkeypatch.chdir(tmp_path)
    yield write_chain(tmp_path)
    gc.unfreeze()


def rehearse(*words):
    return main(["rehearse", "--config", "chain.yaml", *words])


def left(chain):
    return sorted(path.name for path in (chain / "runs").iterdir())


def test_every_stage_is_stopped_and_goes_on_and_nothing_stays_but_the_result(chain, capsys):
    assert rehearse() == 0
    assert StubRecipe.trained == [(4, 0), (4, 1), (8, 0), (8, 1)]
    assert left(chain) == ["stub.rehearsal.json"]
    told = json.loads((chain / "runs" / "stub.rehearsal.json").read_text())
    assert [stage["resumed"] for stage in told["stages"]] == [True, True]
    assert told["error"] is None
    out = capsys.readouterr().out
    assert "resume    a, b: stopped after the first step, went on from its checkpoint" in out
    assert "result: " in out


def test_a_run_directory_stays_as_it_is(chain):
    assert main(["finetune", "--config", "chain.yaml", "stage.a.max_steps=1", "stage.b.max_steps=1"]) == 0
    before = tree(chain / "runs" / "stub")
    assert rehearse() == 0
    assert tree(chain / "runs" / "stub") == before
    assert rehearse("name=other", "run_dir=runs/stub") == 2, "it belongs to another chain"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("stage", [4, 8])
def test_a_signal_ends_it_and_nothing_stays(chain, number, stage, capsys):
    StubRecipe.events = {(stage, 0, "step"): number}
    assert rehearse() == EXIT_PREEMPTED
    assert left(chain) == []
    assert "the rehearsal was stopped by a signal" in capsys.readouterr().out


def test_what_fails_is_told_and_nothing_stays_but_the_result(chain, monkeypatch, capsys):
    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StubRecipe, "setup", fail)
    assert rehearse() == 2
    assert left(chain) == ["stub.rehearsal.json"]
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: stage a: out of memory on rank 0 (node ")
    assert " before the first step; change " in error
    assert json.loads((chain / "runs" / "stub.rehearsal.json").read_text())["error"] == error.removeprefix("error: ")


def test_a_stage_that_does_not_go_on_is_told(chain, monkeypatch, capsys):
    log = StubRecipe.log_train_metrics
    monkeypatch.setattr(
        StubRecipe, "log_train_metrics", lambda self, sample: log(self, sample) if sample.step else None
    )
    assert rehearse() == 2
    assert "stage a did not go on after a preemption: it logged the steps [1]" in capsys.readouterr().err


def test_a_bug_stays_a_traceback(chain, monkeypatch):
    monkeypatch.setattr(StubRecipe, "setup", lambda self: {}["x"])
    with pytest.raises(KeyError):
        rehearse()
    assert left(chain) == []


def test_without_locks_it_runs_and_says_so(chain, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert rehearse() == 0
    assert "no lock (Function not implemented): nothing keeps two commands from one run_dir" in capsys.readouterr().out


def test_a_disk_that_is_too_small_makes_it_fail(chain, monkeypatch, capsys):
    monkeypatch.setattr("nemo_bard.pipeline.rehearse.findings.needed_gib", lambda *_, **__: 1e9)
    assert rehearse() == 2
    assert "disk too small: the chain will write 1000000000.0 GiB" in capsys.readouterr().err
