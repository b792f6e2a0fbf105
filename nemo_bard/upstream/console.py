"""What the console shows of other packages: their warnings about what cannot be helped stay out, all others stay in.

``NEMO_BARD_DEBUG=1`` shows everything. Importing it imports no other package, so that it can be called before any is.
"""

from __future__ import annotations

import logging
import os
import warnings

from nemo_bard.upstream import automodel

WARNINGS = (
    "Transformer Engine and Apex are not installed",  # megatron-fsdp, not used here
    "DTensor random operators may not have complete support on cpu",  # FSDP2 of a model without dropout
    "'set_vital' is deprecated",  # torchdata 0.11
    "TypedStorage is deprecated",  # NeMo AutoModel's checkpoints
)
"""Beginnings of Python warnings."""
RECORDS = {
    "": ("save_consolidated=final but v4_compatible=False",),
    "nemo_automodel.components.loggers.mlflow_utils": ("Skipping MLflow metric timestamp",),
    "torch.utils._pytree": ("<enum ",),  # torchao
    "torch.utils.cpp_extension": ("No CUDA runtime is found",),
    "transformers.configuration_utils": ("`torch_dtype` is deprecated",),  # NeMo AutoModel's key
    "transformers.modeling_utils": ("`torch_dtype` is deprecated",),
    "torch.distributed.elastic.agent.server.api": ("Received ",),  # signals, of which `nemo_bard.launch` tells
    "torch.distributed.elastic.multiprocessing.api": ("Sending process ",),
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous": (
        "The node ",
    ),  # "has failed to shut down": others were faster
}
"""Name of a logger -> beginnings of its warnings."""


def debugging() -> bool:
    """Whether everything is to be seen."""
    return os.environ.get("NEMO_BARD_DEBUG") == "1"


class _Hide(logging.Filter):
    """Drops warnings that begin in a known way; errors pass."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or not record.getMessage().startswith(self.beginnings)


def hush() -> None:
    """Hide known warnings of other packages; calling it before they are imported hides those of their imports too."""
    if debugging():
        return
    for beginning in WARNINGS:
        warnings.filterwarnings("ignore", message=beginning, category=UserWarning)
    for name, beginnings in RECORDS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Hide) for known in logger.filters):
            logger.addFilter(_Hide(beginnings))


def keep_to_own_lines() -> None:
    """Leave the console to one progress line per stage: what else is told of a step is in the metrics files anyway.

    Recipes set the level of the root logger when they start, hence the switch for the whole process.
    """
    if debugging():
        return
    logging.disable(logging.INFO)
    automodel.stop_printing()


def allow_all_lines() -> None:
    """Undo ``keep_to_own_lines``."""
    logging.disable(logging.NOTSET)
    automodel.resume_printing()
