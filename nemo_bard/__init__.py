"""nemo_bard: block-diffusion vision-language models (BARD, arXiv 2604.16514) for NVIDIA NeMo AutoModel.

Importing the package is cheap: it tells transformers where to find ``bard_vl`` and nothing else. Public names are loaded
when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_bard.base import moved
from nemo_bard.base.lazy import lazy
from nemo_bard.upstream.registration import install as _install_registration

if TYPE_CHECKING:
    from nemo_bard.generation.settings import BardGenerationConfig
    from nemo_bard.model.configuration import BardVLConfig
    from nemo_bard.model.modeling import BardVLForConditionalGeneration

__version__ = "0.1.0"
__all__ = ["BardGenerationConfig", "BardVLConfig", "BardVLForConditionalGeneration", "__version__"]

__getattr__, __dir__, _ = lazy(
    __name__,
    {
        "BardGenerationConfig": "generation.settings",
        "BardVLConfig": "model.configuration",
        "BardVLForConditionalGeneration": "model.modeling",
    },
)

moved.install()
_install_registration()
