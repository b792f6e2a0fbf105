"""nemo_bard: block-diffusion vision-language models (BARD, arXiv 2604.16514) for NVIDIA NeMo AutoModel.

Importing the package is cheap: it tells transformers where to find ``bard_vl`` and nothing else. Public names are loaded
when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nemo_bard._registration import install as _install_registration

if TYPE_CHECKING:
    from nemo_bard.configuration import BardGenerationConfig, BardVLConfig
    from nemo_bard.model import BardVLForConditionalGeneration

__version__ = "0.1.0"

_LAZY = {
    "BardVLConfig": "nemo_bard.configuration",
    "BardGenerationConfig": "nemo_bard.configuration",
    "BardVLForConditionalGeneration": "nemo_bard.model",
}

__all__ = ["BardGenerationConfig", "BardVLConfig", "BardVLForConditionalGeneration", "__version__"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


_install_registration()
