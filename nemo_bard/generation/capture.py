"""CUDA graphs captured by hand: a function of static tensors, recorded once and replayed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WARM_UPS = 2
"""Runs before a capture, in which libraries allocate and compilers compile."""
_CAPTURING = threading.Lock()


class Captured:
    """A function that reads and writes tensors in place; its kernels are recorded at the first call and replayed from then on.

    If recording fails, a warning says why, and the function is called as it is.

    Args:
        run: Takes and returns nothing, reads nothing on the host, and allocates the same in every call.
        state: All tensors that it writes to and reads later, in place; warm-ups leave them as they were.
        pool: Memory that graphs share which never run at the same time.
        enabled: Whether to record at all.
        on_failure: Called if recording fails, before anything else runs.
    """

    def __init__(
        self,
        run: Callable[[], None],
        state: Sequence[Tensor],
        *,
        pool: GraphPool,
        enabled: bool,
        on_failure: Callable[[], None],
    ) -> None:
        self.run, self.state, self.pool, self.enabled = run, state, pool, enabled
        self.on_failure = on_failure
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run it, or replay what was recorded."""
        if self.enabled and self.graph is None:
            try:
                self.graph = self._capture()
            except Exception as error:  # whatever a driver, a compiler or a strategy raises, decoding goes on
                self.enabled = False
                self.on_failure()
                reason = " ".join(str(error).split())
                logger.warning("decoding runs without a CUDA graph, which is slower: capturing failed (%s)", reason)
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in self.state]
        try:
            with _CAPTURING, torch.cuda.device(self.state[0].device):
                current, side = torch.cuda.current_stream(), torch.cuda.Stream()
                side.wait_stream(current)
                with torch.cuda.stream(side):
                    for _ in range(WARM_UPS):
                        self.run()
                current.wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool.handle(), capture_error_mode="thread_local"):
                    self.run()
            return graph
        finally:
            for tensor, value in zip(self.state, before, strict=True):
                tensor.copy_(value)


class GraphPool:
    """Memory of graphs, made when the first one is captured."""

    def __init__(self) -> None:
        self._handle: Any = None

    def handle(self) -> Any:
        """What ``torch.cuda.graph`` takes as ``pool``."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle
