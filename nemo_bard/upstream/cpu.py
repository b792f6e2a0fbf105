"""What AutoModel 0.7.0's VLM recipes need on a machine without CUDA.

Upstream asks for the CUDA device in four places that a CPU-only PyTorch answers with an error or with None. ``apply``
answers them, and one more place relies on the copy to it; where CUDA exists it does nothing. Remove a line here once upstream runs without it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nemo_automodel.components.distributed.init_utils import DistInfo

_MARK = "_nemo_bard_cpu"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""From glibc's ``malloc.h``."""


def apply() -> None:
    """Let upstream's recipes run on CPU; call it before a recipe is built, as often as you like.

    Without CUDA, in this process: ``torch.cuda.reset_peak_memory_stats`` does nothing and ``torch.cuda.current_device``
    is 0 (``recipes/vlm/finetune.py:setup``, ``_transformers/auto_model.py:from_pretrained``); models are placed on the
    CPU instead of ``cuda:0`` (``_transformers/auto_model.py:_build_model``); ``DistInfo.device`` is ``cpu`` instead of
    None (``components/distributed/init_utils.py:initialize_distributed``); labels become contiguous, as a copy to a GPU
    makes them (``components/loss/masked_ce.py`` refuses the label views of upstream's collate function otherwise).
    Freed memory goes back to the system (``return_freed_memory``). Nothing is undone.
    """
    if torch.cuda.is_available():
        return
    return_freed_memory()
    # Imported late: upstream's model loader imports this package back through its architecture entry point.
    import nemo_automodel._transformers.auto_model as auto_model
    import nemo_automodel.components.distributed.init_utils as init_utils
    import nemo_automodel.recipes.vlm.finetune as finetune

    if getattr(auto_model.apply_model_infrastructure, _MARK, False):
        return
    torch.cuda.reset_peak_memory_stats = _do_nothing
    torch.cuda.current_device = _device_zero
    auto_model.apply_model_infrastructure = _on_cpu(auto_model.apply_model_infrastructure)
    initialize = _with_device(init_utils.initialize_distributed)
    init_utils.initialize_distributed = initialize
    finetune.initialize_distributed = initialize
    finetune.calculate_loss = _contiguous_labels(finetune.calculate_loss)


def return_freed_memory() -> None:
    """Let glibc give blocks of 2 MiB and more back to the system as soon as they are freed.

    By default it raises that limit to 32 MiB as such blocks come and go; the activations of a step then stay in its
    heap, in pieces between gradients, where larger tensors find no room: some hundred MiB that nobody uses. Smaller blocks
    stay, as every return costs a page fault for each 4 KiB when the next one comes. Other allocators are left alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def normalise_device(dist_env: DistInfo) -> None:
    """Make ``dist_env.device`` a ``torch.device``, in place.

    Upstream leaves None without CUDA, and the bare device number when the process group already exists (the second
    recipe of a process).
    """
    device = dist_env.device
    if device is None:
        dist_env.device = torch.device("cpu")
    elif isinstance(device, int):
        dist_env.device = torch.device("cuda", device)


def _do_nothing(*_args: object, **_kwargs: object) -> None:
    """Stand in for ``torch.cuda.reset_peak_memory_stats``."""


def _device_zero() -> int:
    """Stand in for ``torch.cuda.current_device``."""
    return 0


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: object, **kwargs: object) -> object:
        return function(*args, **{**kwargs, "device": torch.device("cpu")})

    setattr(wrapper, _MARK, True)
    return wrapper


def _with_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: object, **kwargs: object) -> object:
        dist_env = function(*args, **kwargs)
        normalise_device(dist_env)
        return dist_env

    return wrapper


def _contiguous_labels(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: object, labels: torch.Tensor, **kwargs: object) -> object:
        return function(*args, **kwargs, labels=labels.contiguous())

    return wrapper
