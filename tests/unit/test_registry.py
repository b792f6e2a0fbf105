"""Names of things: ours, those of entry points, dotted names; a wrong entry point is told, and told again."""

import sys
import threading

import pytest

from nemo_bard.base.registry import Registry


@pytest.fixture
def declare(tmp_path, monkeypatch, install_package):
    """Installs a package that declares entry points of the group ``tests.tools``."""

    def write(entry_points, code="class Saw: ...\nclass File: ...\n"):
        install_package(tmp_path, "registry-tools", {"registry_tools": code}, f"[tests.tools]\n{entry_points}")
        sys.modules.pop("registry_tools", None)

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    sys.modules.pop("registry_tools", None)


def tools(check=None):
    return Registry("tool.name", "tests.tools", {"hammer": "builtins.int"}, check=check)


def test_ours_entry_points_and_dotted_names(declare):
    declare("saw = registry_tools:Saw\n")
    registry = tools()
    assert registry.names() == ["hammer", "saw"]
    assert registry.get("hammer") is int
    assert registry.get("saw") is sys.modules["registry_tools"].Saw
    assert registry.get("registry_tools.File") is sys.modules["registry_tools"].File
    with pytest.raises(ValueError, match=r"^tool.name must be one of hammer, saw, got 'sav' \(did you mean 'saw'\?\)$"):
        registry.get("sav")
    with pytest.raises(ValueError, match=r"^tool.name: registry_tools.Nothing cannot be imported"):
        registry.get("registry_tools.Nothing")


@pytest.mark.parametrize(
    ("entry_points", "message"),
    [
        (
            "saw = registry_tools:Saw\nfile = registry_tools:Nothing\n",
            "^tool.name: the entry point 'file' of tests.tools: ",
        ),
        (
            "saw = registry_tools:Saw\nhammer = registry_tools:File\n",
            "^tool.name: the entry point 'hammer' of .* taken",
        ),
    ],
)
def test_a_wrong_entry_point_is_told_at_every_use(declare, entry_points, message):
    declare(entry_points)
    registry = tools()
    for use in (registry.names, lambda: registry.get("hammer"), lambda: "saw" in registry):
        with pytest.raises(ValueError, match=message):
            use()
    declare("saw = registry_tools:Saw\n")
    assert registry.names() == ["hammer", "saw"]


def test_threads_see_all_names_whoever_reads_them_first(declare):
    declare("saw = registry_tools:Saw\n", "import time\ntime.sleep(0.2)\nclass Saw: ...\n")
    registry, seen = tools(), []
    threads = [threading.Thread(target=lambda: seen.append(registry.names())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["hammer", "saw"]] * 4
