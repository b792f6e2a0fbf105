"""vLLM as it is installed here, seen without importing it."""

from __future__ import annotations

import functools
import importlib.util
from importlib import metadata

SUPPORTED = ">=0.32,<0.33"
"""Versions of vLLM whose interface the plugin is written for; ``constraints-vllm.txt`` holds the set that was tried."""
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "bard_vl"
"""Entry point by which vLLM finds us."""
INSTALL = f"pip install 'vllm{SUPPORTED}' && pip install --no-deps nemo-bard"
"""How to serve with vLLM, in an environment of its own: nemo-automodel cannot be there."""


@functools.cache
def vllm_distribution() -> str | None:
    """The name of the distribution that holds vLLM, which differs by what it was built for; None if there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    return next(iter(metadata.packages_distributions().get("vllm", [])), "vllm")


def vllm_version() -> str | None:
    """The installed version of vLLM, None if there is none."""
    name = vllm_distribution()
    if name is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "0 (without metadata)"


def check_vllm_version(version: str | None) -> None:
    """Raise ValueError, in one line, unless this is a version of vLLM that the plugin is written for."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    if version is None:
        raise ValueError(f"vLLM is not installed here; in an environment of its own: {INSTALL}")
    try:
        fits = SpecifierSet(SUPPORTED).contains(Version(version), prereleases=True)
    except InvalidVersion:
        fits = False
    if not fits:
        raise ValueError(f"nemo_bard needs vLLM {SUPPORTED}, and {version} is installed: pip install 'vllm{SUPPORTED}'")
