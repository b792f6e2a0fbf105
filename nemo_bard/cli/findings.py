"""What a check of an installation found, and the checks of versions that every environment needs."""

from __future__ import annotations

from collections.abc import Container, Iterator
from importlib import metadata
from typing import NamedTuple

OK, WARNING, BROKEN = "ok", "warning", "broken"
OPTIONAL = {"triton": "comes with CUDA builds of torch"}


class Check(NamedTuple):
    """One finding; ``repair`` is empty where nothing is wrong."""

    name: str
    state: str
    finding: str
    repair: str = ""

    def __str__(self) -> str:
        text = f"{self.state:<8} {self.name}: {self.finding}"
        return f"{text}\n         repair: {self.repair}" if self.repair else text


def installed_version(name: str) -> str | None:
    """Return the installed version of the distribution ``name``, None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_requirements(
    distribution: str, *, among: Container[str] | None = None, state: str = BROKEN
) -> Iterator[Check]:
    """Yield what ``distribution`` requires and the environment violates (extras left out), or one line that all is met.

    Args:
        distribution: Name of an installed distribution; of one that is not nothing is said.
        among: Names of the requirements to look at; all if None.
        state: Of a requirement that is violated.
    """
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return
    violated = False
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if among is not None and requirement.name not in among:
            continue
        version = installed_version(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        name = f"requirement of {distribution}"
        if version is None and requirement.name not in OPTIONAL:
            violated = True
            yield Check(name, state, f"{wanted} is not installed", f"pip install '{wanted}'")
        elif version is not None and not requirement.specifier.contains(version, prereleases=True):
            violated = True
            yield Check(name, state, f"{wanted}, but {version} is installed", f"pip install '{wanted}'")
    if not violated:
        yield Check(f"requirements of {distribution}", OK, "met")


def one_line(error: Exception) -> str:
    """Return type and message of ``error`` on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
