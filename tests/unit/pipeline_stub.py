"""A recipe that trains one number, with the interface and the files of NeMo AutoModel's recipes."""

import hashlib
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from safetensors.torch import load_file, save_file

STEPS, EVERY = 5, 2


class KilledError(BaseException):
    """Stands for a process that is gone."""


class Handler:
    def __init__(self):
        self.received = False
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGUSR1)}

    def note(self, *_):
        self.received = True

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class StubRecipe:
    """``events`` maps (block size, step, place) to what happens there: ``kill``, or a signal to this process."""

    any_ranks = True
    events: dict = {}
    trained: list = []
    refs: list = []

    def __init__(self, cfg):
        self.cfg = cfg

    def happen(self, place):
        event = self.events.pop((self.block, self.step_scheduler.step, place), None)
        if event == "kill":
            raise KilledError
        if event is not None:
            os.kill(os.getpid(), event)

    def setup(self):
        self.block = self.cfg.get("model.block_size")
        self.out = Path(self.cfg.get("checkpoint.checkpoint_dir"))
        self.out.mkdir(parents=True, exist_ok=True)
        init = Path(self.cfg.get("model.pretrained_model_name_or_path"))
        weights = load_file(init / "model.safetensors")
        self.weight = weights.get("weight", torch.tensor([1.0]))
        self.step_scheduler = SimpleNamespace(
            step=0,
            max_steps=self.cfg.get("step_scheduler.max_steps"),
            every=self.cfg.get("step_scheduler.ckpt_every_steps"),
            sigterm_flag=False,
            sigterm_received=False,
            sig_handler=Handler(),
        )
        self.model_parts = [torch.nn.Linear(2, 2)]
        self.model_parts[0].register_forward_hook(lambda *_: self)  # a cycle
        self.optimizer = [torch.optim.SGD(self.model_parts[0].parameters())]
        self.dataloader = self.val_dataloader = None
        publish = SimpleNamespace(publish=lambda path: (Path(path) / ".incomplete").unlink())
        self.checkpointer = SimpleNamespace(lifecycle=publish)
        self.metric_logger_train = Log(self.out / "training.jsonl")
        self.metric_logger_valid = Log(self.out / "validation.jsonl")
        restore = self.cfg.get("checkpoint.restore_from", None)
        if restore is not None:
            self.weight = load_file(Path(restore) / "model" / "shard.safetensors")["weight"]
            self.step_scheduler.step = torch.load(Path(restore) / "step_scheduler.pt")["step"]

    def _make_progress_bar(self):
        return None

    def log_train_metrics(self, sample):
        self.metric_logger_train.log({"step": sample.step, **sample.metrics})

    def run_train_validation_loop(self):
        import weakref

        StubRecipe.refs.append(weakref.ref(self.model_parts[0]))
        self._make_progress_bar()
        scheduler = self.step_scheduler
        while scheduler.step < scheduler.max_steps and not scheduler.sigterm_flag:
            self.happen("step")
            StubRecipe.trained.append((self.block, scheduler.step))
            self.weight = self.weight * 0.9 + self.cfg.get("optimizer.lr") * (scheduler.step + self.block)
            loss = float(self.weight)
            self.log_train_metrics(SimpleNamespace(step=scheduler.step, metrics={"loss": loss, "tps": 5.0, "mem": 0.0}))
            scheduler.sigterm_flag = scheduler.sig_handler.received
            last = scheduler.step + 1 == scheduler.max_steps
            if last or scheduler.sigterm_flag or (scheduler.step + 1) % scheduler.every == 0:
                self.save_checkpoint(0, scheduler.step, loss, {}, last=last)
            self.happen("after")
            scheduler.step += 1
        self.metric_logger_train.close()
        self.metric_logger_valid.close()

    def save_checkpoint(self, epoch, step, _loss, _val, *, last):
        folder = self.out / f"epoch_{epoch}_step_{step}"
        assert not folder.exists() or (folder / ".incomplete").exists(), "upstream refuses to overwrite a published one"
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "optim").mkdir(exist_ok=True)
        (folder / ".incomplete").touch()
        save_file({"weight": self.weight}, folder / "model" / "shard.safetensors")
        self.happen("save")
        torch.save({"step": step + 1}, folder / "step_scheduler.pt")
        (folder / "config.yaml").write_text("a: 1\n")
        (folder / "optim" / ".metadata").write_text("x")
        if last:
            consolidated = folder / "model" / "consolidated"
            consolidated.mkdir(exist_ok=True)
            config = {"model_type": "bard_vl", "block_size": self.block}
            (consolidated / "config.json").write_text(json.dumps(config))
            save_file({"weight": self.weight}, consolidated / "model.safetensors")
        self.checkpointer.lifecycle.publish(str(folder))


class Log:
    """Buffers like upstream's logger: what is not flushed is lost with the process."""

    def __init__(self, path):
        self.path, self.lines = path, []

    def log(self, entry):
        self.lines.append(json.dumps(entry))

    def flush(self):
        with self.path.open("a") as file:
            file.writelines(f"{line}\n" for line in self.lines)
        self.lines = []

    close = flush


def write_chain(folder):
    """Configuration of a user's own: a pipeline of two stages in ./conf, a recipe, and a start."""
    start = folder / "start"
    start.mkdir()
    (start / "config.json").write_text('{"model_type": "bard_vl", "block_size": 4}')
    save_file({"weight": torch.tensor([1.0])}, start / "model.safetensors")
    (folder / "stub.yaml").write_text(
        yaml.safe_dump(
            {
                "recipe": "pipeline_stub.StubRecipe",
                "model": {"pretrained_model_name_or_path": None, "block_size": None},
                "optimizer": {"lr": 0.1},
                "step_scheduler": {"global_batch_size": 4, "local_batch_size": 2, "max_steps": STEPS},
            }
        )
    )
    (folder / "conf" / "pipeline").mkdir(parents=True)
    stage = {"recipe": "stub.yaml", "data": False, "evaluate": False, "ckpt_every_steps": EVERY}
    pipeline = {
        "defaults": [
            {"/stage@stage.a": "pbm"},
            {"/stage@stage.b": "pbm"},
            {"override /data": "digits"},
            {"override /model": "tiny"},
        ],
        "name": "stub",
        "order": ["a", "b"],
        "stage": {"a": {**stage, "block_size": 4, "init": str(start)}, "b": {**stage, "block_size": 8}},
        "evaluation": {"data": None},
    }
    (folder / "conf" / "pipeline" / "stub.yaml").write_text("# @package _global_\n" + yaml.safe_dump(pipeline))
    (folder / "chain.yaml").write_text("recipe: nemo_bard.pipeline.Pipeline\npipeline: stub\n")
    return folder


def tree(folder):
    """Every file with its content, but for the lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
