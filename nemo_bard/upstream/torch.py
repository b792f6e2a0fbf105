"""What we touch of PyTorch and torchdata. Nothing is imported here before it is used."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from nemo_bard.upstream.touched import Touched

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_read = partial(Touched, version="torch 2.12.1")
TOUCHED = (
    _read(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        reason="attention in strips needs the logarithms of the sums that its backward takes",
        until="a public CPU kernel returns them, or flex_attention has a backward on CPU",
    ),
    _read(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
        reason="the backward of one strip",
        until="as its forward",
    ),
    _read(
        "torch._dynamo.mark_static_address",
        reason="CUDA graphs record writes to the cache only if its address is known not to change",
        until="torch.compiler has it",
        parameters="t, guard",
    ),
    _read(
        "torch.ops.aten._assert_async",
        reason="placeholders of images are counted on the device, without making the host wait for the number",
        until="torch has a public assertion on the device",
    ),
    *(
        _read(
            f"torch.nn.Module.{name}",
            reason="copied by `upstream.views`: decoding runs on copies of the modules, which share the parameters",
            until="torch can copy modules without their parameters",
        )
        for name in ("_modules", "_buffers", "_compiled_call_impl")
    ),
    *(
        _read(
            f"torch.nn.Module.{name}",
            reason="decoding calls modules, in place of its own products, if a user's hooks are on them",
            until="torch can tell whether a module has hooks",
        )
        for name in ("_forward_hooks", "_forward_pre_hooks")
    ),
    _read(
        "torch.nn.Linear.forward",
        reason="the LM head that Qwen3-VL builds becomes one that takes a function in the place of its product",
        until="transformers' models take the class of their head",
        parameters="self, input",
    ),
    Touched(
        "torchdata.stateful_dataloader.stateful_dataloader.StatefulDataLoader._iterator",
        reason="a loader keeps its iterator, and the iterator its worker processes, until both are collected",
        until="loaders have a public way to close",
        version="torchdata 0.11.0",
    ),
    Touched(
        "torchdata.stateful_dataloader.stateful_dataloader._StatefulMultiProcessingDataLoaderIter._shutdown_workers",
        reason="ends the worker processes of a stage before the next one starts",
        until="loaders have a public way to close",
        parameters="self",
        version="torchdata 0.11.0",
    ),
    _read(
        "torch.utils.data.DataLoader.worker_init_fn",
        reason="workers that NeMo AutoModel's loaders start have to ignore the signals of the job",
        until="NeMo AutoModel's dataloader section takes a worker_init_fn",
    ),
)
"""What this room and ``model`` touch of torch; ``docs/decisions.md`` says why there is a room for it."""


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with the CPU kernel that autograd would call.

    Args:
        query: ``[N, H, Q, D]``.
        key: ``[N, Hkv, K, D]``.
        value: ``[N, Hkv, K, D]``.
        mask: 0 and -inf, ``[N, 1, Q, K]``.
        scale: Factor on the scores.

    Returns:
        ``[N, H, Q, D]``, and the logarithms of the sums, which the backward takes.
    """
    import torch

    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, attn_mask=mask, scale=scale)


def cpu_attention_backward(
    grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor], out: Tensor, log_sums: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from the gradient of what ``cpu_attention`` gave for these ``inputs``."""
    import torch

    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return attend(grad, *inputs, out, log_sums, 0.0, False, attn_mask=mask, scale=scale)


def mark_static_address(tensor: Tensor) -> None:
    """Promise the compiler that a tensor stays where it is."""
    import torch._dynamo

    torch._dynamo.mark_static_address(tensor)


def to_device_without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on a device; the host goes on while it is copied (CUDA only, through pinned memory)."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def check_without_waiting(condition: Tensor, message: str) -> None:
    """Check a bool scalar where it is: on CUDA the device stops at an assertion, and the host does not wait for it.

    Raises:
        ValueError: On the CPU, if it is False.
    """
    import torch

    if condition.device.type == "cuda":
        torch.ops.aten._assert_async.msg(condition, message)
    elif not condition:
        raise ValueError(message)


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module that is built the methods of a subclass of its class; parameters and their names stay.

    Raises:
        TypeError: If ``kind`` derives from another class.
    """
    if not issubclass(kind, type(module)):
        raise TypeError(f"{kind.__name__} is no subclass of {type(module).__name__}")
    module.__class__ = kind


class _IgnoreSignals:
    """A ``worker_init_fn`` that ignores signals before it calls another."""

    def __init__(self, names: tuple[str, ...], then: Callable[[int], None] | None) -> None:
        self.names, self.then = names, then

    def __call__(self, worker_id: int) -> None:
        for name in self.names:
            signal.signal(signal.Signals[name], signal.SIG_IGN)
        if self.then is not None:
            self.then(worker_id)


def shield_workers(loader: Any, signals: Iterable[str]) -> None:
    """Keep the workers of a data loader alive when signals go to all processes of a job.

    torchrun (2.12) signals the whole process group of a worker, Slurm every process of a step. A data loader's worker dies
    of SIGTERM, which makes its owner raise in the middle of the checkpoint that the signal asked for.

    Args:
        loader: A data loader whose workers have not started.
        signals: Names such as ``SIGTERM``.
    """
    loader.worker_init_fn = _IgnoreSignals(tuple(signals), loader.worker_init_fn)


def stop_workers(loader: Any) -> None:
    """End the worker processes of a data loader, which live as long as its iterator otherwise."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is None:
        return
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
    loader._iterator = None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` or anything in it does more than its class says: hooks, or a forward of its own."""
    return any(
        one._forward_hooks or one._forward_pre_hooks or "forward" in one.__dict__ or one._compiled_call_impl is not None
        for one in module.modules()
    )


def own_weight(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer without bias whose weight is one dense tensor of floating point."""
    from torch import nn
    from torch.distributed.tensor import DTensor

    if type(module) is not nn.Linear or module.bias is not None:
        return False
    return module.weight.is_floating_point() and not isinstance(module.weight, DTensor) and not module.weight.is_meta


_JOINING = threading.Lock()


def join_weights(*modules: nn.Module) -> Tensor:
    """Make the weights of linear layers one tensor, ``[sum of outputs, inputs]``; the layers keep their parts of it.

    The parameters stay the same objects, with the same values, in other memory. Joined before, they are left alone. No other
    thread may compute with them meanwhile, but any number may join them.
    """
    with _JOINING:
        return _join(modules)


def _join(modules: tuple[nn.Module, ...]) -> Tensor:
    import torch

    weights: list[Any] = [module.weight for module in modules]
    rows, columns = sum(len(weight) for weight in weights), weights[0].shape[1]
    first = weights[0].data
    end, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for weight in weights:
        if (
            weight.untyped_storage().data_ptr() != storage
            or weight.storage_offset() != end
            or not weight.is_contiguous()
        ):
            break
        end += weight.numel()
    else:
        return first.as_strided((rows, columns), (columns, 1))
    joined = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, joined.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    return joined
