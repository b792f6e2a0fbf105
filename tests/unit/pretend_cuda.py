"""Tensors that say ``cuda:0``, hold real values in CPU memory, and tell what a GPU would have had to wait for.

    with PretendCuda() as log:
        to_cuda(model)
        out = model(ids.to("cuda"))
    assert not log.syncs

What ran is counted in ``log``: host synchronisations and where they come from, kernel launches, bytes copied to the device,
allocations. Tensors of CPU and device in one operation raise as they do on a GPU. ``Tensor.backward`` works.

What it can not tell: the time anything takes, what a kernel does inside (kernels run as their CPU counterparts), and whether
a kernel takes these shapes, except for those in ``KERNELS``, which check what theirs ask for.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from varlen_on_cpu import varlen_backward, varlen_forward, varlen_forward_out

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
STAGED_BYTES = 64 * 1024
"""Up to this size a driver copies pageable memory aside and does not make the host wait, if the copy is ``non_blocking``."""

VIEWS = (
    {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach"}
    | {"alias", "as_strided", "split", "split_with_sizes", "unbind", "_reshape_alias", "lift_fresh", "diagonal"}
    | {"unfold", "view_as_real", "view_as_complex"}
)
SILENT = VIEWS | {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "is_pinned"}
"""Operations that launch no kernel."""
UNIQUE = {"_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}
READS = UNIQUE | {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "histc"}
READS |= {"masked_scatter_backward"}
"""Operations whose result, or its size, the host has to wait for."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
KERNELS: dict[str, Callable[..., Any]] = {
    "torch_attn::_varlen_attn": varlen_forward,
    "torch_attn::_varlen_attn_out": varlen_forward_out,
    "torch_attn::_varlen_attn_backward": varlen_backward,
}
"""What stands in for kernels that have no CPU counterpart."""


class Sync(NamedTuple):
    """The host waits for the device."""

    kind: str
    where: str
    """The frames outside torch that led there, innermost first."""


class Allocation(NamedTuple):
    """A tensor that was not there before."""

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class CudaTensor(Tensor):
    """Says that it lives on ``cuda:0``; its values are in ``elem``, on the CPU."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor, requires_grad: bool = False) -> CudaTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=CUDA,
            requires_grad=requires_grad,
        )
        made.elem = elem.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return PretendCuda.active().run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"CudaTensor({self.elem!r})"

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.elem.untyped_storage()

    def set_(self, source: torch.UntypedStorage, *layout: Any) -> CudaTensor:
        """Gives another tensor, since the shape of this one can not change."""
        return CudaTensor(self.elem.new_empty(0).set_(source, *layout))

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": CUDA, **kwargs})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: CudaTensor) -> None:
        assert value.shape == self.shape
        assert value.dtype == self.dtype
        self.elem = value.elem

    def __deepcopy__(self, memo: dict) -> CudaTensor:
        copied = CudaTensor(self.elem.clone(), self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = copied
        return copied


class PretendCuda(TorchDispatchMode):
    """Inside, tensors can be on ``cuda``; what they would have cost is counted.

    Args:
        available: What ``torch.cuda.is_available`` says.
    """

    _active: ClassVar[list[PretendCuda]] = []

    def __init__(self, *, available: bool = False) -> None:
        super().__init__()
        self.available = available
        self.mismatches: list[str] = []
        self.graph: Graph | None = None
        self._hidden = 0
        self._patches = ExitStack()
        self._pinned: set[int] = set()
        self.reset()

    @staticmethod
    def active() -> PretendCuda:
        assert PretendCuda._active, "a CudaTensor outlived its PretendCuda"
        return PretendCuda._active[-1]

    def reset(self) -> None:
        """Count from zero."""
        self.syncs: list[Sync] = []
        self.operations: Counter[str] = Counter()
        self.launches = 0
        self.copied_to_device = 0
        self.allocations: list[Allocation] = []

    def sync(self, kind: str) -> None:
        """The host waits here."""
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {kind}")
        if not self._hidden:
            self.syncs.append(Sync(kind, where()))

    @contextmanager
    def kernel(self, name: str) -> Iterator[None]:
        """What is done inside counts as one launch, as it stands for one kernel (or for one graph's replay)."""
        self._count(name, launches=1)
        self._hidden += 1
        try:
            yield
        finally:
            self._hidden -= 1

    def __enter__(self) -> PretendCuda:
        if not torch.cuda.is_available():
            torch._C._ensureCUDADeviceGuardSet()
        PretendCuda._active.append(self)
        for target, name, value in _patches(self):
            self._patches.enter_context(mock.patch.object(target, name, value))
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._patches.close()
        PretendCuda._active.remove(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run an ATen operation on the values, and count it."""
        space, name = func._schema.name.split("::")
        device = kwargs.get("device")
        device = None if device is None else torch.device(device)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        cuda = [x for x in tensors if isinstance(x, CudaTensor)]
        if not cuda and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        if name == "_fused_sdp_choice":
            return 0
        if name == "_to_copy" and device is not None and (len(cuda) == 0 or device.type == "cpu"):
            return self._transfer(func, args, kwargs)
        if name == "copy_" and len(cuda) != len(tensors):
            return self._copy(*args, **kwargs)
        self._check(name, args, kwargs, tensors)
        inner = {key: CPU if key == "device" else value for key, value in kwargs.items() if key != "pin_memory"}
        call = KERNELS.get(f"{space}::{name}", func)
        values = tree_map_only(CudaTensor, _value, (args, inner))
        self._count(name, launches=name not in SILENT)
        with torch._C._DisableTorchDispatch():
            out = call(*values[0], **values[1])
        if self.graph is not None:
            self.graph.record(call, values, out)
        return self._wrap(name, out, cuda)

    def _wrap(self, name: str, out: Any, inputs: list[CudaTensor]) -> Any:
        """Outputs as device tensors; an input that was written to is itself."""
        known = {id(x.elem): x for x in inputs}

        def wrap(x: Tensor) -> Tensor:
            if id(x) in known:
                return known[id(x)]
            if name not in VIEWS and not self._hidden:
                self.allocations.append(Allocation(name, tuple(x.shape), x.dtype))
            return CudaTensor(x)

        return tree_map_only(Tensor, wrap, out)

    def _count(self, name: str, launches: int) -> None:
        if not self._hidden:
            self.operations[name] += 1
            self.launches += int(launches)

    def _transfer(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        source = args[0]
        inner = {key: CPU if key == "device" else value for key, value in kwargs.items() if key != "pin_memory"}
        with torch._C._DisableTorchDispatch():
            out = func(_value(source), **inner)
        if isinstance(source, CudaTensor):
            self._moved("D2H copy", out, kwargs.get("non_blocking", False), host=None)
            return out
        self._moved("H2D copy", out, kwargs.get("non_blocking", False), host=source)
        return CudaTensor(out)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        to_device = isinstance(target, CudaTensor)
        self._moved("H2D copy" if to_device else "D2H copy", target, non_blocking, host=source if to_device else target)
        with torch._C._DisableTorchDispatch():
            _value(target).copy_(_value(source))
        return target

    def _moved(self, kind: str, moved: Tensor, non_blocking: bool, host: Tensor | None) -> None:
        """Count a copy; it makes the host wait unless it is non_blocking, and out of or into pinned memory."""
        size = moved.numel() * moved.element_size()
        self._count(kind, launches=1)
        if kind == "H2D copy" and not self._hidden:
            self.copied_to_device += size
        pinned = host is not None and self.is_pinned(host)
        staged = kind == "H2D copy" and size <= STAGED_BYTES
        if not non_blocking:
            self.sync(kind)
        elif not pinned and not staged or not pinned and self.graph is not None:
            self.sync(f"{kind} (pageable)")

    def _check(self, name: str, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
        """Count what waits; raise on tensors of two devices."""
        host = [x for x in tensors if not isinstance(x, CudaTensor) and x.dim() > 0]
        if name in READS:
            self.sync(name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.sync("repeat_interleave without output_size")
        elif name in INDEXING:
            index = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in index):
                filled = name != "index" and not isinstance(args[2], CudaTensor) and args[2].numel() == 1
                if not filled:
                    self.sync("boolean index")
            if isinstance(args[0], CudaTensor):
                for x in index:
                    if not isinstance(x, CudaTensor) and x.dim() > 0:
                        self._moved("H2D copy", x, False, host=x)
                host = [x for x in host if all(x is not y for y in index)]
        if host:
            self.mismatches.append(f"{name}: CPU tensor {tuple(host[0].shape)} at {where()}")
            raise RuntimeError(f"Expected all tensors to be on the same device: {self.mismatches[-1]}")

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy in memory that is taken to be pinned."""
        if self.is_pinned(tensor):
            return tensor
        copied = tensor.clone()
        address = copied.untyped_storage().data_ptr()
        self._pinned.add(address)
        weakref.finalize(copied.untyped_storage(), self._pinned.discard, address)
        return copied

    def is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, CudaTensor) and tensor.untyped_storage().data_ptr() in self._pinned


def _value(x: Tensor) -> Tensor:
    return x.elem if isinstance(x, CudaTensor) else x


def where(depth: int = 4) -> str:
    """The innermost frames that are not torch's or this module's, up to the first of nemo_bard."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < depth:
        name = frame.f_code.co_filename
        if name != __file__ and "/torch/" not in name and "/contextlib" not in name:
            found.append(f"{name.split('site-packages/')[-1]}:{frame.f_lineno}")
            if "/nemo_bard/" in name:
                break
        frame = frame.f_back
    return " < ".join(found)


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``: what was captured runs again, on the same tensors, into the same tensors."""

    def __init__(self, keep_graph: bool = False) -> None:
        del keep_graph
        self._steps: list[tuple[Callable[..., Any], tuple, list[Tensor]]] = []

    def record(self, call: Callable[..., Any], values: tuple, out: Any) -> None:
        """Remember an operation, and where its results were put."""
        self._steps.append((call, values, [x for x in tree_leaves(out) if isinstance(x, Tensor)]))

    def replay(self) -> None:
        """Run the operations again: one launch."""
        with PretendCuda.active().kernel("graph replay"), torch._C._DisableTorchDispatch():
            for call, (args, kwargs), kept in self._steps:
                made = [x for x in tree_leaves(call(*args, **kwargs)) if isinstance(x, Tensor)]
                for old, new in zip(kept, made, strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def reset(self) -> None:
        self._steps.clear()

    def pool(self) -> tuple[int, int]:
        return (0, 0)


class _Capture:
    """Stands for ``torch.cuda.graph``."""

    def __init__(self, cuda_graph: Graph, pool: Any = None, stream: Any = None, **kwargs: Any) -> None:
        del pool, stream, kwargs
        self.graph = cuda_graph

    def __enter__(self) -> None:
        PretendCuda.active().graph = self.graph

    def __exit__(self, *args: Any) -> None:
        PretendCuda.active().graph = None


class _Stream:
    """Stands for ``torch.cuda.Stream`` and ``torch.cuda.Event``: everything is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def wait_stream(self, stream: Any) -> None:
        del stream

    def wait_event(self, event: Any) -> None:
        del event

    def wait(self, stream: Any = None) -> None:
        del stream

    def record(self, stream: Any = None) -> None:
        del stream

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        PretendCuda.active().sync("synchronize")

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


def _patches(log: PretendCuda) -> Iterator[tuple[Any, str, Any]]:
    """What of torch is something else while CUDA is pretended: (owner, name, value)."""
    cuda = torch.cuda
    yield cuda, "_lazy_init", lambda: None
    yield cuda, "is_available", lambda: log.available
    yield cuda, "current_device", lambda: 0
    yield cuda, "set_device", lambda device: None
    yield cuda, "_exchange_device", lambda index: 0
    yield cuda, "_maybe_exchange_device", lambda index: 0
    yield cuda, "device_count", lambda: 1
    yield cuda, "get_device_capability", lambda device=None: (9, 0)
    yield cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3"
    yield cuda, "is_bf16_supported", lambda including_emulation=True: True
    yield cuda, "max_memory_allocated", lambda device=None: 0
    yield cuda, "synchronize", lambda device=None: log.sync("synchronize")
    yield cuda, "current_stream", lambda device=None: _Stream()
    yield cuda, "stream", lambda stream: _Stream()
    yield cuda, "is_current_stream_capturing", lambda: log.graph is not None
    yield cuda, "graph_pool_handle", lambda: (0, 0)
    yield cuda, "CUDAGraph", Graph
    yield cuda, "graph", _Capture
    yield cuda, "Stream", _Stream
    yield cuda, "Event", _Stream
    make, attend = torch.tensor, F.scaled_dot_product_attention

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        made = make(data, **kwargs)
        return made if device is None else made.to(device)

    def as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        made = data if isinstance(data, Tensor) else make(data)
        return made.to(device=made.device if device is None else device, dtype=dtype or made.dtype)

    def sdpa(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(query, CudaTensor):
            return attend(query, *args, **kwargs)
        with log.kernel("scaled_dot_product_attention"):
            return attend(query, *args, **kwargs)

    # torch's constructors copy below every dispatch mode
    yield torch, "tensor", tensor
    yield torch, "as_tensor", as_tensor
    yield F, "scaled_dot_product_attention", sdpa
    yield Tensor, "pin_memory", lambda x, device=None: log.pin(x)
    yield Tensor, "is_pinned", lambda x, device=None: log.is_pinned(x)
    yield Tensor, "backward", backward
    yield torch.autograd, "grad", grad
    yield torch._C, "_current_graph_task_id", lambda: _task[-1] if _task else -1


_task: list[int] = []
"""The backward passes that run; checkpointing computes an activation again once in each."""


def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    """Stands for ``Tensor.backward``: the same nodes in the same order, without the engine, which wants a real device."""
    _walk(loss, gradient, None)


def grad(outputs: Tensor, inputs: Tensor, allow_unused: bool = False) -> tuple[Tensor | None]:
    """Stands for ``torch.autograd.grad`` of one leaf."""
    found = _walk(outputs, None, inputs)
    assert found is not None or allow_unused
    return (found,)


def _walk(loss: Tensor, gradient: Tensor | None, leaf: Tensor | None) -> Tensor | None:
    """Run backward; with a leaf, give its gradient instead of adding gradients to leaves."""
    assert loss.grad_fn is not None
    order = _topological(loss.grad_fn)
    grads: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss) if gradient is None else gradient}}
    found = None
    _task.append(id(loss))
    try:
        with torch.no_grad():
            for node in order:
                given = grads.pop(node, None)
                if given is None:
                    continue
                if leaf is not None and hasattr(node, "variable"):
                    found = given[0] if node.variable is leaf else found
                    continue
                made = _apply(node, given)
                for grad, (after, index) in zip(made, node.next_functions, strict=False):
                    if after is not None and grad is not None:
                        slots = grads.setdefault(after, {})
                        grad = _fit(grad, after._input_metadata[index])
                        slots[index] = slots[index] + grad if index in slots else grad
    finally:
        _task.pop()
    return found


def _apply(node: Any, given: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of a node's inputs from those of its outputs; a Python function gets zeros for what nobody used."""
    if isinstance(node, BackwardCFunction):
        of = node._input_metadata
        zeros = {i: torch.zeros(of[i].shape, dtype=of[i].dtype, device=CUDA) for i in range(len(of)) if i not in given}
        made = node.apply(*({**given, **zeros}[i] for i in range(len(of))))
    else:
        made = node(*(given.get(i) for i in range(len(node._input_metadata))))
    return made if isinstance(made, tuple) else (made,)


def _fit(grad: Tensor, of: Any) -> Tensor:
    """A gradient in the shape and dtype of what it belongs to, as the engine makes it."""
    grad = grad if grad.shape == of.shape else grad.sum_to_size(of.shape)
    return grad if grad.dtype == of.dtype else grad.to(of.dtype)


def _topological(root: Any) -> list[Any]:
    """Nodes of a graph, each before those that take its gradients."""
    order, seen, stack = [], {root}, [(root, iter(root.next_functions))]
    while stack:
        node, rest = stack[-1]
        after = next((x for x, _ in rest if x is not None and x not in seen), None)
        if after is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(after.next_functions)))
    return order[::-1]


def to_cuda(module: nn.Module) -> nn.Module:
    """Move a module in place; ``Module.to`` can not, as it keeps the type of its parameters. Tied weights stay tied."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, CudaTensor):
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(CudaTensor(parameter.data), parameter.requires_grad)
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, CudaTensor):
                part._buffers[name] = moved.setdefault(id(buffer), CudaTensor(buffer))
    return module
