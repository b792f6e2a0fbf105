"""Runs recipes on several numbers of ranks, all forked from one process: ``ranks_driver.py JOBS.json``.

The file holds ``{number of ranks: [job, ...]}``, or a list of these, one after the other. A job is one of ``pbm_driver``,
with ``ranks_per_node`` to pretend, and ``counts``, where rank 0 writes what it held and received in the last step, or
``stream``, a folder where every rank writes the samples of its steps and their noise. Importing AutoModel takes longer than a
run, and forking does not import it again.
"""

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import socket
import sys

import pbm_driver
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import AutoProcessor

from nemo_bard.upstream import cpu as cpu_compat

RECIPES = dict(pbm_driver.RECIPES)
COLLECTIVES = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
}


class Counts:
    """Bytes of gradients after each microbatch of a step, and bytes received in all of them."""

    def __init__(self):
        self.running = False
        self.start()

    def start(self):
        """Forget the step before."""
        self.whole, self.sharded, self.traffic = [], [], dict.fromkeys(COLLECTIVES.values(), 0)

    def grads(self, model):
        """Note the bytes of whole and of sharded gradients."""
        params = [
            param
            for module in model.modules()
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None
            for param in group.fsdp_params
        ]
        held = [param.unsharded_accumulated_grad for param in params]
        held += [param._unsharded_param.grad for param in params if hasattr(param, "_unsharded_param")]
        local = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]
        self.whole.append(sum(grad.nbytes for grad in held if grad is not None))
        self.sharded.append(sum(grad.nbytes for grad in local if grad is not None))

    def received(self, name, tensors, group):
        """Note the bytes of a collective, by the ring algorithm."""
        members = dist.get_world_size(group)
        whole = max(tensor.nbytes for tensor in tensors) * (2 if name == "all_reduce" else 1)
        self.traffic[name] += whole * (members - 1) // members

    def write(self, path):
        """Write them."""
        with open(path, "w") as file:
            json.dump({"whole": self.whole, "sharded": self.sharded, "traffic": self.traffic}, file)


def counted(base, counts):
    """The recipe class, noting into ``counts`` what its last step held and received."""

    class Counted(base):
        def microbatch(self, index, batch, **kwargs):
            if index == 0:
                counts.start()
            counts.running = True
            super().microbatch(index, batch, **kwargs)
            counts.running = False
            counts.grads(self.model_parts[0])

    return Counted


def recorded(base, folder):
    """The recipe class, writing into a folder: step, index and noise of every sample of this rank."""

    class Recorded(base):
        def microbatch(self, index, batch, **kwargs):
            with open(f"{folder}/{os.getpid()}.jsonl", "a") as file:
                for row, sample, item in batch["noise_keys"]:
                    own = batch["sample_ids"][row] == sample
                    parts = [batch[key][row][own] for key in ("input_ids", "labels", "loss_mask")]
                    noise = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
                    file.write(json.dumps([self.step_scheduler.step, item, noise]) + "\n")
            super().microbatch(index, batch, **kwargs)

    return Recorded


@contextlib.contextmanager
def counted_collectives(counts):
    """Collectives inside this context are counted where they belong to a microbatch."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def noted(name):
        def collective(*args, group=None, **kwargs):
            if counts.running:
                tensors = [thing for thing in (*args, *kwargs.values()) if isinstance(thing, torch.Tensor)]
                counts.received(COLLECTIVES[name], tensors, group)
            return originals[name](*args, group=group, **kwargs)

        return collective

    for name in COLLECTIVES:
        setattr(dist, name, noted(name))
    yield
    for name, original in originals.items():
        setattr(dist, name, original)


def work(rank, ranks, port, jobs):
    """One rank: all jobs, in one process group."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    for job in jobs:
        os.environ["LOCAL_WORLD_SIZE"] = str(job.get("ranks_per_node", ranks))
        counts, name = Counts(), job.get("recipe", "pbm")
        pbm_driver.RECIPES[name] = counted(RECIPES[name], counts) if "counts" in job else RECIPES[name]
        if "stream" in job:
            os.makedirs(job["stream"], exist_ok=True)
            pbm_driver.RECIPES[name] = recorded(RECIPES[name], job["stream"])
        with counted_collectives(counts):
            pbm_driver.run(job["overrides"], job.get("sigterm_at"), name)
        if rank == 0 and "counts" in job:
            counts.write(job["counts"])


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    cpu_compat.apply()
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        given = json.load(file)
    turns = given if isinstance(given, list) else [given]
    first = next(iter(turns[0].values()))[0]["overrides"]
    AutoProcessor.from_pretrained(first["model.pretrained_model_name_or_path"])  # imports a lot, once for all
    gc.freeze()  # what is there already is never garbage
    context = multiprocessing.get_context("fork")
    for worlds in turns:
        processes = []
        for number, jobs in worlds.items():
            port, ranks = free_port(), int(number)
            processes += [context.Process(target=work, args=(rank, ranks, port, jobs)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if failed := max(abs(process.exitcode or 0) for process in processes):
            sys.exit(failed)
