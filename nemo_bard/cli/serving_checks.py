"""Checks of an environment that serves with vLLM; ``nemo-bard doctor`` prints them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata

from nemo_bard.base.names import MODEL_CLASS
from nemo_bard.cli.findings import BROKEN, OK, WARNING, Check, check_requirements, one_line
from nemo_bard.upstream import vllm as installed

NEEDED = ("numpy", "packaging", "pillow", "torch", "torchvision", "transformers")
"""Requirements of nemo-bard that the plugin has too."""
FILTER = "VLLM_PLUGINS"
"""vLLM's own variable: names of the plugins to load."""


def run_checks() -> Iterator[Check]:
    """Yield the checks in order; the last one imports vLLM."""
    yield check_version()
    yield from check_requirements("nemo-bard", among=NEEDED)
    yield from check_requirements(installed.distribution() or "vllm", state=WARNING)
    plugin = check_plugin()
    yield plugin
    if plugin.state == OK:
        yield check_architecture()


def check_version() -> Check:
    """Check that the plugin is written for the vLLM that is installed."""
    version = installed.installed_version() or "unknown"
    if not installed.is_supported(version):
        finding, _, repair = installed.unsupported(version).partition("; ")
        return Check("vllm", BROKEN, finding, repair)
    return Check("vllm", OK, f"{version} ({installed.distribution()})")


def check_plugin() -> Check:
    """Check that vLLM finds our plugin by the installed metadata, and may load it."""
    name = "vllm plugin"
    found = {point.name: point.value for point in metadata.entry_points(group=installed.PLUGIN_GROUP)}
    if installed.PLUGIN not in found:
        repair = "pip install --force-reinstall --no-deps nemo-bard (a checkout: pip install --no-deps .)"
        return Check(name, BROKEN, f"{installed.PLUGIN_GROUP} has no {installed.PLUGIN}", repair)
    allowed = os.environ.get(FILTER)
    if allowed is not None and installed.PLUGIN not in allowed.split(","):
        return Check(name, BROKEN, f"{FILTER}={allowed} leaves out {installed.PLUGIN}", f"unset {FILTER}")
    return Check(name, OK, f"{installed.PLUGIN} = {found[installed.PLUGIN]}")


def check_architecture() -> Check:
    """Check that vLLM can be imported, and knows the architecture once the plugin is loaded."""
    name = "vllm architecture"
    try:
        from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

        for point in metadata.entry_points(group=installed.PLUGIN_GROUP, name=installed.PLUGIN):
            point.load()()
        known = MODEL_CLASS in ModelRegistry.get_supported_archs()
    except Exception as error:  # an import may fail with anything; it becomes the finding
        repair = "repair the requirements named above; pip install -c constraints-vllm.txt vllm is a set that was tried"
        return Check(name, BROKEN, f"vLLM or the plugin cannot be loaded: {one_line(error)}", repair)
    if not known:
        return Check(name, BROKEN, f"vLLM does not know {MODEL_CLASS}", f"pip install 'vllm=={installed.SUPPORTED}.*'")
    return Check(name, OK, f"{MODEL_CLASS} is known to vLLM")
