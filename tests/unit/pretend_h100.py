"""Lower the code that is compiled for GPUs on a machine without one: ``python pretend_h100.py NAME...`` prints a JSON object.

Inductor is told that there is an H100 and stopped before it would load what it has written; the Triton kernels in that are then
compiled to sm_90. Names are ``decode`` (the kernels between the products of a denoising step) and ``flex`` (the forward of a
training row). This is a program of its own, since it replaces what torch and Triton say about the machine.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.device_interface as interface
import torch._inductor.config as inductor
import torch.utils._triton as torch_triton
import triton
from torch import Tensor
from torch._inductor import scheduler
from torch._inductor.fx_passes import fuse_attention, joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="", is_integrated=0, clock_rate=1980000, memory_clock_rate=2619000,
    memory_bus_width=5120,
)  # fmt: skip
HEURISTICS = ("pointwise", "reduction", "persistent_reduction", "template", "foreach", "cooperative_reduction")


class Lowered(Exception):
    """Carries the code that Inductor has written."""


class Driver:
    """What Triton asks about the machine."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            del device
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        del device
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


def pretend() -> None:
    """Replace what says that there is no GPU, and stop Inductor behind its code generation."""
    torch._C._ensureCUDADeviceGuardSet()
    cuda: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "_lazy_init": lambda: None, "current_device": lambda: 0,
        "get_device_properties": lambda device=None: PROPERTIES, "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: PROPERTIES.name, "synchronize": lambda *a: None,
        "is_initialized": lambda: False, "_exchange_device": lambda index: 0, "_maybe_exchange_device": lambda index: 0,
        "get_rng_state": lambda *a: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *a, **k: None,
    }  # fmt: skip
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_exchangeDevice = lambda index: 0
    worker: Any = interface.CudaInterface.Worker
    worker.get_device_properties = staticmethod(lambda device=None: PROPERTIES)
    worker.current_device = staticmethod(lambda: 0)
    for name in ("is_available", "current_device", "device_count", "get_device_properties"):
        setattr(interface.CudaInterface, name, staticmethod(cuda[name]))
    interface.CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)
    fuse_attention._sfdp_init = joint_graph._sfdp_init = lambda *a, **k: None
    scheduler.has_triton = torch_triton.has_triton = lambda: True
    inductor.joint_graph_constant_folding, inductor.force_disable_caches, inductor.compile_threads = False, True, 1
    triton.runtime.driver.set_active(Driver())

    def stop(self: GraphLowering) -> None:
        code, _ = self.codegen()
        raise Lowered(code.value)

    GraphLowering.compile_to_module = GraphLowering._compile_to_module = stop


def lowered(compiled: Any, *inputs: Any) -> str:
    """The code that Inductor writes for a call."""
    try:
        compiled(*inputs)
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, Lowered):
            found = found.__cause__ or found.__context__
        if found is None:
            raise
        return str(found)
    raise AssertionError("the compiler was not asked")


def compile_kernels(code: str) -> list[int]:
    """Compile the Triton kernels in Inductor's code to sm_90; bytes of each."""
    blocks = re.findall(r"triton_\w+ = async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", code, re.S)
    sizes = []
    triton_helpers.set_driver_to_gpu = lambda: None
    kept: dict[str, Any] = {}

    def keep(kind: str) -> Any:
        return lambda *a, **options: lambda function: kept.update(kind=kind, options=options, function=function)

    for kind in HEURISTICS:
        setattr(triton_heuristics, kind, keep(kind))
    with tempfile.TemporaryDirectory() as folder:
        for name, text in blocks:
            path = Path(folder) / f"{name}.py"
            path.write_text(text)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            meta, kind = kept["options"]["triton_meta"], kept["kind"]
            constants = dict(meta.get("constants", {}))
            for block, size in (("XBLOCK", 256 if kind == "pointwise" else 1), ("R0_BLOCK", 1024), ("YBLOCK", 16)):
                if meta["signature"].get(block) == "constexpr":
                    constants.setdefault(block, size)
            source = ASTSource(fn=kept["function"], signature=dict(meta["signature"]), constexprs=constants)
            made = triton.compile(source, target=TARGET, options={"num_warps": meta.get("num_warps", 4)})
            sizes.append(len(made.asm["cubin"]))
    return sizes


def decode(rows: int = 64, hidden: int = 2560, inner: int = 9728, heads: int = 32, kv_heads: int = 8) -> dict[str, str]:
    """Code of the kernels of a denoising step at the shapes of the 4B model, in bfloat16."""
    from nemo_bard.generation.kernels import Kernels

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda")

    kernels, size = Kernels.compiled(), 128
    inputs: dict[str, tuple] = {
        "norm": (empty(rows, hidden), empty(hidden), 1e-6),
        "add_norm": (empty(rows, hidden), empty(rows, hidden), empty(hidden), 1e-6),
        "gate": (empty(rows, 2 * inner),),
        "rotate": (
            empty(rows, (heads + 2 * kv_heads) * size), empty(size), empty(size), 1e-6, empty(rows, size), empty(rows, size),
            heads // kv_heads,
        ),
    }  # fmt: skip
    return {name: lowered(getattr(kernels, name), *values) for name, values in inputs.items()}


def flex(length: int = 1024) -> dict[str, str]:
    """Code of flex_attention's forward at the shapes of the 4B model, with the mask of a training row."""
    from nemo_bard.model.attention import compile_flex
    from nemo_bard.train.masks import block_mask

    third = length // 4
    branch = torch.tensor([0] * 3 * third + [1] * third, device="cpu")
    block = torch.cat([torch.arange(3 * third) // 8, torch.arange(2 * third, 3 * third) // 8])
    batch = {"sample_ids": torch.zeros(1, length), "branch_ids": branch[None], "block_ids": block[None]}
    batch = {name: value.long().cuda() for name, value in batch.items()}
    mask = block_mask(batch, "block")
    query, key, value = (
        torch.empty(1, heads, length, 128, dtype=torch.bfloat16, device="cuda") for heads in (32, 8, 8)
    )
    return {"flex": lowered(compile_flex(), query, key, value, mask, None)}


def main(names: list[str]) -> None:
    pretend()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        codes = {name: code for kind in names for name, code in {"decode": decode, "flex": flex}[kind]().items()}
    found = {}
    for name, code in codes.items():
        launches = re.findall(r"(triton_\w+)\.run\(", code)
        others = re.findall(r"(?:extern_kernels|torch\.ops\.\w+)\.\w+", code[code.find("def call") :])
        found[name] = {"launches": len(launches), "others": others, "sizes": compile_kernels(code)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
