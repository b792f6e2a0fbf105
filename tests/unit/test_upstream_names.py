"""What we touch of NeMo AutoModel, transformers and torch is where it was, and touched in one room only."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nemo_bard.upstream import automodel, card, registration
from nemo_bard.upstream import torch as torch_room
from nemo_bard.upstream import transformers as transformers_room
from nemo_bard.upstream.touched import Touched, parameters_of, what_moved

TABLES = (automodel.TOUCHED, card.TOUCHED, registration.TOUCHED, transformers_room.TOUCHED, torch_room.TOUCHED)
DISTRIBUTIONS = ("nemo-automodel", "transformers", "torch", "torchdata", "qwen-vl-utils")
ROWS = [row for table in TABLES for row in table]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_where_it_was(row):
    if (moved := what_moved(row)) is not None:
        pytest.fail(f"{moved}\n  we need it because: {row.reason}\n  until: {row.until}", pytrace=False)


def test_every_row_says_why_until_when_and_which_version():
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.reason, row.name
        assert row.until, row.name
        assert row.version.split()[0] in DISTRIBUTIONS, row.name


EXAMPLE = """
class Example:
    field: int

    def __init__(self, size):
        self.inside = size

    def method(self, a, *, b=1, **others):
        return a, b, others
"""
NAME = "upstream_example.Example"


@pytest.fixture
def _importable(monkeypatch, tmp_path):
    """A stand-in for another package."""
    (tmp_path / "upstream_example.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("upstream_example", None)


@pytest.mark.usefixtures("_importable")
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (f"{NAME}.method", {"parameters": "self, a, *, b, **others"}, None),
        (f"{NAME}.inside", {}, None),
        (f"{NAME}.field", {}, None),
        (f"{NAME}.method", {"source": "return a, b, others"}, None),
        (f"{NAME}.method", {"parameters": "self, a, b"}, "now takes (self, a, *, b, **others) instead of (self, a, b)"),
        (f"{NAME}.gone", {}, "Example has no gone"),
        (f"{NAME}.gone.further", {}, "Example has no gone"),
        ("upstream_example.Nobody", {}, "has no Nobody"),
        ("nemo_automodel.no_such_module.name", {}, "nemo_automodel has no no_such_module"),
        ("no_such_package.name", {}, "No module named 'no_such_package'"),
        (f"{NAME}.method", {"source": "yield"}, "no longer holds 'yield'"),
    ],
)
def test_what_moves_is_named(name, change, said):
    moved = what_moved(replace(Touched(name, "a reason", "some day", version="x 1"), **change))
    assert moved is None if said is None else said in moved, moved
    if moved is not None:
        assert moved.startswith(f"{name} (read in x 1)")
        assert "\n" not in moved


def test_parameters_are_written_as_in_a_signature():
    def function(a, /, b, *rest, c, d=1, **others):
        """Every kind of parameter."""

    def keywords(a, *, b):
        """A bare star."""

    assert parameters_of(function) == "a, b, *rest, c, d, **others"
    assert parameters_of(keywords) == "a, *, b"


# ------------------ the accessors ------------------
def recipe(**parts):
    """Something with what a recipe has."""
    calls = []
    made = SimpleNamespace(
        calls=calls,
        checkpointer=SimpleNamespace(
            lifecycle=SimpleNamespace(publish=lambda path, **kwargs: calls.append(("publish", path, kwargs)))
        ),
        save_checkpoint=lambda *args: calls.append(("save", *args)),
        log_train_metrics=lambda sample: calls.append(("log", sample)),
        _make_progress_bar=lambda: SimpleNamespace(set_description=lambda text: calls.append(("title", text))),
        **parts,
    )
    return made


def test_calls_are_put_around_a_recipe():
    made = recipe()
    automodel.before_publication(made, lambda path: made.calls.append(("settle", path)))
    automodel.around_saving(made, lambda: made.calls.append("before"), lambda: made.calls.append("after"))
    automodel.after_step(made, lambda sample: made.calls.append(("step", sample)))
    made.checkpointer.lifecycle.publish("p", is_async=False)
    made.save_checkpoint(0, 1)
    made.log_train_metrics("s")
    assert made.calls == [
        ("settle", "p"),
        ("publish", "p", {"is_async": False}),
        "before",
        ("save", 0, 1),
        "after",
        ("log", "s"),
        ("step", "s"),
    ]


def test_a_progress_bar_gets_a_title_or_is_not_drawn():
    made = recipe()
    automodel.set_progress_bar(made, "stage")
    assert made._make_progress_bar() is not None
    assert made.calls == [("title", "stage")]
    automodel.set_progress_bar(made, None)
    assert made._make_progress_bar() is None


def test_signals_are_released_if_there_are_any():
    released = []
    handler = SimpleNamespace(release=lambda: released.append(1))
    automodel.release_signals(SimpleNamespace())
    automodel.release_signals(SimpleNamespace(step_scheduler=SimpleNamespace(sig_handler=None)))
    automodel.release_signals(SimpleNamespace(step_scheduler=SimpleNamespace(sig_handler=handler)))
    assert released == [1]


def test_workers_of_a_loader_ignore_signals_and_end():
    import signal

    from torchdata.stateful_dataloader import StatefulDataLoader

    seen = []
    loader = StatefulDataLoader(list(range(8)), num_workers=1, persistent_workers=True, worker_init_fn=seen.append)
    torch_room.shield_workers(loader, ("SIGTERM",))
    before = signal.getsignal(signal.SIGTERM)
    try:
        loader.worker_init_fn(3)
        assert seen == [3]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    iterator = iter(loader)
    next(iterator)
    (worker,) = iterator._workers
    assert worker.is_alive()
    torch_room.stop_workers(loader)
    worker.join(10)
    assert not worker.is_alive()
    torch_room.stop_workers(loader)


def test_reports_of_failed_targets_are_held_back(capsys):
    from nemo_automodel.components.config.loader import ConfigNode

    node = ConfigNode({"_target_": "nemo_bard.data.JsonlDataset", "path": "/does/not/exist.jsonl"})
    with pytest.raises(ValueError, match="does not exist"), automodel.hold_back_instantiation_reports() as held:
        node.instantiate()
    assert "JsonlDataset" in "\n".join(held)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="does not exist"):
        node.instantiate()
    assert "JsonlDataset" in "".join(capsys.readouterr()), "upstream prints again"


def test_a_module_becomes_one_of_a_subclass_only():
    import torch
    from torch import nn

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected, names = 2 * layer(x), dict(layer.named_parameters())
    torch_room.become(layer, Doubled)
    assert torch.equal(layer(x), expected)
    assert dict(layer.named_parameters()) == names
    with pytest.raises(TypeError, match="Linear is no subclass of Doubled"):
        torch_room.become(layer, nn.Linear)
