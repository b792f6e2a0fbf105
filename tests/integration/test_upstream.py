"""What comes from NeMo AutoModel, through our recipe: checkpointing, precision, groups, freezing, LoRA, loggers."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_pbm import TRAIN, read_log, write_data

from nemo_bard.method.schedule import NoiseSettings

pytestmark = pytest.mark.slow

LORA = {"_target_": "nemo_automodel.components._peft.lora.PeftConfig", "dim": 4, "alpha": 8}


class Lab:
    """Runs the PBM recipe in this process, in folders of its own; everything is small."""

    def __init__(self, folder):
        from nemo_bard.checkpoints.convert import convert
        from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

        self.folder, self.start = folder, folder / "start"
        convert(make_tiny_qwen3_vl(folder / "source"), self.start, block_size=4)
        self.data = write_data(folder / "data", 6)
        self.recipes = []

    def build(self, name, steps=2, **changes):
        """A recipe that is set up, not run."""
        from nemo_automodel.components.config.loader import load_yaml_config

        from nemo_bard.base.paths import recipes_dir
        from nemo_bard.train.pbm import PBMRecipe

        config = load_yaml_config(recipes_dir() / "pbm.yaml")
        where = {
            "step_scheduler.max_steps": steps,
            "step_scheduler.val_every_steps": 100,
            "model.pretrained_model_name_or_path": str(self.start),
            "dataset.path": str(self.data),
            "checkpoint.checkpoint_dir": str(self.folder / name),
            "checkpoint.enabled": False,
        }
        for key, value in {**TRAIN, **where, **changes}.items():
            config.set_by_dotted(key, value)
        recipe = PBMRecipe(config)
        recipe.setup()
        recipe.step_scheduler.sig_handler.release()
        self.recipes.append(recipe)
        return recipe

    def run(self, name, steps=2, **changes):
        """A recipe that has run, and its log."""
        recipe = self.build(name, steps, **changes)
        recipe.run_train_validation_loop()
        return recipe, read_log(self.folder / name)

    def validation(self):
        return {"_target_": "nemo_bard.data.JsonlDataset", "path": str(self.data)}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    environment = dict(os.environ)
    yield Lab(tmp_path_factory.mktemp("upstream"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def plain(lab):
    return lab.run("plain")


def losses(log):
    return [line["loss"] for line in log]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", [True, "selective"])
def test_activation_checkpointing_recomputes_and_changes_no_number(lab, plain, kind):
    recipe = lab.build(f"recompute_{kind}", **{"distributed.activation_checkpointing": kind})
    model, calls = recipe.model_parts[0], []
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda *_: calls.append("layer"))
    layer.self_attn.q_proj.register_forward_pre_hook(lambda *_: calls.append("mlp"))
    recipe.run_train_validation_loop()
    log = read_log(lab.folder / f"recompute_{kind}")
    assert losses(log) == losses(plain[1])
    assert [line["grad_norm"] for line in log] == pytest.approx([line["grad_norm"] for line in plain[1]], rel=1e-6)
    microbatches = 3  # six samples by two
    assert len(calls) > 2 * microbatches, "something of the layer ran again in backward"


def test_bfloat16_computes_near_float32_on_float32_weights(lab, plain):
    recipe, log = lab.run("bfloat16", compute_dtype="bfloat16")
    # 8 bits of mantissa in products, float32 in sums, norms and losses
    assert losses(log) == pytest.approx(losses(plain[1]), rel=2e-2)
    assert losses(log) != losses(plain[1])
    assert {p.dtype for p in recipe.model_parts[0].parameters()} == {torch.float32}
    states = [s for optimizer in recipe.optimizer for s in optimizer.state.values()]
    assert {s["exp_avg"].dtype for s in states} == {torch.float32}
    policy = recipe.distributed_setup.strategy_config.mp_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_every_parameter_is_in_its_learning_rate_group(lab):
    seen, peak = {}, TRAIN["optimizer.lr"]
    recipe = lab.build("groups", steps=4)
    (optimizer,), names = recipe.optimizer, {id(p): n for n, p in recipe.model_parts[0].named_parameters()}
    for scheduler in recipe.lr_scheduler:
        scheduler.step(1)  # the end of the warm-up
    for group in optimizer.param_groups:
        seen |= {names[id(p)]: group["lr"] for p in group["params"]}
    assert seen.keys() == set(names.values())
    for name, lr in seen.items():
        is_tower = "visual." in name and "merger" not in name
        assert lr == pytest.approx(peak * (0.1 if is_tower else 1.0)), name
    for scheduler in recipe.lr_scheduler:
        scheduler.step(1)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert len(rates) == 2
    assert min(rates) == pytest.approx(max(rates) / 10)
    assert max(rates) < peak


def test_frozen_modules_stay_and_take_no_optimizer_state(lab):
    config = {"freeze_modules": [{"glob": "model.visual.*"}], "unfreeze_modules": [{"glob": "model.visual.*merger*"}]}
    recipe = lab.build("frozen", freeze_config=config)
    model, before = recipe.model_parts[0], weights(recipe.model_parts[0])
    recipe.run_train_validation_loop()
    (optimizer,) = recipe.optimizer
    with_state = {id(p) for p in optimizer.state}
    for name, p in model.named_parameters():
        frozen = name.startswith("model.visual.") and "merger" not in name
        assert frozen == (not p.requires_grad), name
        assert frozen == torch.equal(p, before[name]), name
        assert frozen == (id(p) not in with_state), name


def test_gradients_are_clipped_to_the_norm(lab):
    rates, sizes = {"optimizer": {"_target_": "torch.optim.SGD", "lr": 1.0}, "lr_scheduler": None}, {}
    for norm in (1e9, 0.5):
        recipe = lab.build(f"clip_{norm}", steps=1, **{**rates, "clip_grad_norm.max_norm": norm})
        before = weights(recipe.model_parts[0])
        recipe.run_train_validation_loop()
        moved = [p.detach() - before[n] for n, p in recipe.model_parts[0].named_parameters()]
        (line,) = read_log(lab.folder / f"clip_{norm}")
        sizes[norm] = (line["grad_norm"], float(torch.linalg.vector_norm(torch.cat([m.flatten() for m in moved]))))
    assert sizes[1e9][0] == pytest.approx(sizes[0.5][0], rel=1e-6), "the norm is logged as it was before clipping"
    assert sizes[1e9][1] == pytest.approx(sizes[1e9][0], rel=1e-3)
    assert sizes[0.5][1] == pytest.approx(0.5, rel=1e-3)


def test_validation_noise_is_fixed_and_levels_give_a_loss_each(lab):
    """Equal weights, other training noise: the same validation loss; the mean of the levels is ``val_loss``."""
    found = []
    for name, noise in (("a", {"name": "mask"}), ("b", {"name": "mask", "low": 0.4, "high": 0.6})):
        changes = {"noise": noise, "seed": 7 if name == "b" else 42, "validation_dataset": lab.validation()}
        recipe = lab.build(f"fixed_{name}", **changes, validation_noise={"name": "mask"})
        found.append(recipe._run_validation_epoch(recipe.val_dataloader).metrics["val_loss"])
    assert found[0] == found[1]
    levels = [0.25, 1.0]
    recipe = lab.build("levels", validation_dataset=lab.validation(), validation_noise={"levels": levels})
    metrics = recipe._run_validation_epoch(recipe.val_dataloader).metrics
    assert metrics["val_loss"] == pytest.approx((metrics["val_loss_t0.25"] + metrics["val_loss_t1"]) / 2)
    assert metrics["val_loss_t0.25"] != metrics["val_loss_t1"]
    alone = recipe._validate(recipe.val_dataloader, NoiseSettings(low=1.0, high=1.0)).metrics
    assert alone["val_loss"] == metrics["val_loss_t1"]
    assert alone["num_label_tokens"] < metrics["num_label_tokens"]


def test_the_best_checkpoint_is_that_of_the_metric(lab):
    changes = {
        "checkpoint.enabled": True,
        "checkpoint.best_metric_key": "val_loss_t1",
        "checkpoint.save_consolidated": False,
        "step_scheduler.ckpt_every_steps": 1,
        "validation_noise": {"levels": [0.5, 1.0]},
        "validation_dataset": lab.validation(),
    }
    recipe = lab.build("best", steps=3, **changes)
    values, validate = iter([(5.0, 1.0), (3.0, 2.0), (4.0, 3.0)]), recipe._validate

    def fake(loader, noise):
        """Losses that say which step is best: the first at level 1, the second at 0.5."""
        sample = validate(loader, noise)
        if noise.low == 0.5:
            fake.now = next(values)
        sample.metrics["val_loss"] = fake.now[noise.low == 1.0]
        return sample

    recipe._validate = fake
    recipe.run_train_validation_loop()
    best = (lab.folder / "best" / "LOWEST_VAL").resolve()
    assert best.name == "epoch_0_step_0"
    assert json.loads((best / "losses.json").read_text())["val_loss_t0.5"] == 5.0
    assert (lab.folder / "best" / "LATEST").resolve() != best


def test_flops_of_a_step_are_logged(plain):
    _, log = plain
    for line in log:
        assert 0 < line["tflops_per_gpu"] < 1
        assert "mfu" not in line, "no peak is known of a CPU"


def test_metrics_reach_wandb_and_mlflow(lab, monkeypatch):
    import nemo_automodel.recipes.vlm.finetune as upstream

    sent = {"wandb": [], "mlflow": []}
    wandb = SimpleNamespace(
        init=lambda **kwargs: sent["wandb"].append(("init", kwargs)) or SimpleNamespace(url="none"),
        run=object(),
        log=lambda metrics, step: sent["wandb"].append((step, metrics)),
        Settings=lambda **kwargs: kwargs,
    )
    mlflow = SimpleNamespace(
        active_run=lambda: True, log_metrics=lambda metrics, step: sent["mlflow"].append((step, metrics))
    )
    for name, module in (("wandb", wandb), ("mlflow", mlflow)):
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(upstream, name, module)
        monkeypatch.setattr(upstream, f"_HAS_{name.upper()}", True)
    monkeypatch.setattr(upstream, "suppress_wandb_log_messages", lambda: None)
    _, log = lab.run("loggers", wandb={"project": "p", "mode": "offline"}, validation_dataset=lab.validation())
    kind, arguments = sent["wandb"][0]
    assert (kind, arguments["project"], arguments["mode"]) == ("init", "p", "offline")
    assert arguments["config"]["loss_fn"]["reduction"] == "mean"
    for rows in (sent["wandb"][1:], sent["mlflow"]):
        trained = [metrics for _, metrics in rows if "loss" in metrics]
        assert [m["loss"] for m in trained] == pytest.approx(losses(log))
        assert {"num_loss_tokens", "num_samples", "tflops_per_gpu"} <= trained[0].keys()
        assert [m for _, m in rows if "val_loss" in m], "validation as well"


@pytest.fixture(scope="module")
def lora(lab):
    changes = {"checkpoint.enabled": True, "step_scheduler.ckpt_every_steps": 2}
    return lab.run("lora", steps=4, peft=LORA, **changes)


def test_lora_trains_adapters_alone(lab, lora):
    from nemo_bard.pipeline.training import final_export

    model = lora[0].model_parts[0]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(trained) == 2 * 7 * model.config.text_config.num_hidden_layers
    folder = lab.folder / "lora" / "LATEST" / "model"
    assert (folder / "adapter_model.safetensors").stat().st_size < 200_000
    stage = SimpleNamespace(checkpoints=lab.folder / "lora")
    assert final_export(stage) == folder.parent.resolve() / "model" / "consolidated", "a chain goes on from it"


def test_lora_resumes_to_the_same_weights(lab, lora):
    recipe, log = lora
    first = lab.folder / "lora" / "epoch_0_step_1"
    shutil.copytree(first, lab.folder / "resumed" / first.name)
    changes = {"checkpoint.enabled": True, "checkpoint.restore_from": str(lab.folder / "resumed" / first.name)}
    again, rest = lab.run("resumed", steps=4, peft=LORA, **changes)
    assert losses(rest) == pytest.approx(losses(log)[2:], rel=1e-6)
    expected = weights(recipe.model_parts[0])
    for name, p in again.model_parts[0].named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-6, atol=1e-7)


def test_lora_checkpoint_merges_into_a_whole_one(lab, lora, tmp_path, capsys):
    """The export of the run and that of the command give the logits of base and adapters."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from nemo_bard.cli.app import main

    recipe, _ = lora
    model = recipe.model_parts[0].eval()
    checkpoint = lab.folder / "lora" / "LATEST"
    assert main(["merge", str(checkpoint), str(tmp_path / "merged")]) == 0
    assert "adapters on 21 of" in capsys.readouterr().out
    assert not (lab.folder / "lora" / "epoch_0_step_1" / "model" / "consolidated").exists(), "save_consolidated: final"
    ids = torch.arange(24).view(2, 12) + 5
    call = {
        "input_ids": ids,
        "attention_mask": torch.ones(2, 1, 12, 12, dtype=torch.bool),
        "position_ids": torch.arange(12).expand(3, 2, 12),
    }
    with torch.no_grad():
        expected = model(**call).logits
        for folder in (tmp_path / "merged", checkpoint / "model" / "consolidated"):
            merged = AutoModelForImageTextToText.from_pretrained(folder).eval()
            assert merged.config.block_size == TRAIN["model.block_size"]
            torch.testing.assert_close(merged(**call).logits, expected, rtol=1e-5, atol=1e-5)
            assert AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()
        base = AutoModelForImageTextToText.from_pretrained(lab.start).eval()
        assert (base(**call).logits - expected).abs().max() > 1e-3, "the adapters have learnt something"
    assert main(["merge", str(checkpoint), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half = AutoModelForImageTextToText.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: None, "no LoRA adapters"),
        (lambda f: {"use_dora": True}, "use_dora=True cannot be merged"),
        (lambda f: {"base_model_name_or_path": str(f)}, "has no config.json"),
        (lambda f: {"r": 0}, "r=0"),
    ],
)
def test_what_cannot_be_merged_is_said_in_one_line(lab, lora, tmp_path, capsys, change, said):
    from nemo_bard.cli.app import main

    shutil.copytree(lab.folder / "lora" / "LATEST" / "model", tmp_path / "model")
    config = tmp_path / "model" / "adapter_config.json"
    changed = change(tmp_path)
    if changed is None:
        config.unlink()
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    assert main(["merge", str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_the_head_is_refused(lab):
    for change, said in (
        ({"target_modules": ["lm_head"]}, "peft puts an adapter on lm_head"),
        ({"match_all_linear": True}, "peft.exclude_modules"),
    ):
        with pytest.raises(ValueError, match=said):
            lab.build("head", peft={**LORA, **change})


def test_numbers_are_finite(plain):
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in plain[1])
