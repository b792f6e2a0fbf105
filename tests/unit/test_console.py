"""What other packages write: what is known and cannot be helped stays out, everything else stays in."""

import importlib
import logging
import warnings

import pytest

from nemo_bard.upstream import automodel, console


@pytest.fixture(autouse=True)
def _as_before():
    filters = {name: list(logging.getLogger(name).filters) for name in console.RECORDS}
    with warnings.catch_warnings():
        yield
    for name, known in filters.items():
        logging.getLogger(name).filters[:] = known
    console.allow_all_lines()


def test_known_warnings_are_hidden_others_and_errors_are_not(caplog):
    console.hush()
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn("TypedStorage is deprecated. It will be removed", UserWarning, stacklevel=1)
        warnings.warn("the disk is nearly full", UserWarning, stacklevel=1)
    assert [str(one.message) for one in seen] == ["the disk is nearly full"]
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.warning("No CUDA runtime is found, using %s", "x")
    logger.warning("something else")
    logger.error("No CUDA runtime is found, and that is an error")
    assert caplog.messages == ["something else", "No CUDA runtime is found, and that is an error"]


def test_debugging_shows_everything(monkeypatch, caplog):
    monkeypatch.setenv("NEMO_BARD_DEBUG", "1")
    for name in console.RECORDS:
        logging.getLogger(name).filters.clear()
    console.hush()
    console.keep_to_own_lines()
    logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found")
    assert caplog.messages == ["No CUDA runtime is found"]
    assert logging.root.manager.disable == logging.NOTSET


def test_modules_that_print_are_kept_quiet_and_let_go(capsys):
    console.keep_to_own_lines()
    for name in automodel.PRINTING:
        importlib.import_module(name).print("recipe: ...", flush=True)
    assert capsys.readouterr().out == ""
    console.allow_all_lines()
    for name in automodel.PRINTING:
        assert not hasattr(importlib.import_module(name), "print")


def test_upstream_still_prints_there():
    import inspect

    for name in automodel.PRINTING:
        assert "print(" in inspect.getsource(importlib.import_module(name)), f"{name} need not be kept quiet any more"
