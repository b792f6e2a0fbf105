"""A plan as text and as plain values, with its formulas and everything that it assumes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nemo_bard.cost.count import GIB
from nemo_bard.cost.estimate import Plan

FORMULAS = (
    "row = prompt + (2 ceil(response / B) - 1) B",
    "pairs = visible (query, key) pairs of the row under the block mask",
    "FLOPs forward = 2 row layers (2 H q + 2 H kv + 3 H I) + 4 layers q pairs + 2 supervised H V + vision tower",
    "FLOPs of a sample = 3 forward (+ forward without LM head with activation checkpointing)",
    "S = G / replicas: GPUs that share a replica; m: microbatches of a step on a GPU",
    "weights, gradients, AdamW = 4 N / S, 4 N / S, 8 N / S bytes (float32 masters, FSDP2)",
    "gradients, deferred = 4 N in place of 4 N / S, if m > 1, G > 1 and gradients are reduced after the last microbatch only",
    "gathered weights = b (root + 2 layers) if G > 1, else b N copies of autocast if b < 4; root: embedding, LM head,"
    " last norm",
    "unreduced gradients = b (root + 1 layer) + 4 V H of the LM head's sum if b < 4; G > 1 only",
    "buffers of collectives = b layer + 4 max(layer, untied LM head); G > 1 only",
    "text activations = tokens layers (4 H + 3 q + 3 kv + 2 I) b; with checkpointing tokens (layers H b + one layer)",
    "vision activations = patches (depth (11 h b + 2 i b + rotary) + mergers); with checkpointing alike",
    "logits = 3 x 4 bytes x 256 tokens x V",
    "all-gather = m b (N + N') (S - 1) / S bytes a step; N': what the backward gathers again, all but last layers, LM head, rest",
    "reduce-scatter = r 4 N (S - 1) / S, all-reduce = r 2 (4 N / S) (replicas - 1) / replicas; r = 1 if deferred, else m",
    "seconds of a collective = received / node bandwidth, or what other nodes have / bandwidth of its adapters in a node",
    "seconds of communication = max(sum of those within nodes, sum of those between nodes)",
    "seconds of computation = FLOPs of a sample x samples per GPU / real tokens / (utilisation x peak)",
    "seconds of a step = max(computation, communication)",
    "days = samples / global batch x seconds / 86400",
)
"""What is computed; q and kv: heads times head size of queries and of keys."""

COLLECTIVES = {
    "all_gather": "all-gather of weights",
    "reduce_scatter": "reduce-scatter of grads",
    "all_reduce": "all-reduce of replicas",
}


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything as plain values, with totals, formulas and assumptions."""
    facts = asdict(plan)
    facts["parameters"]["total"] = plan.parameters.total
    facts["flops_per_sample"].update(forward=plan.flops_per_sample.forward, model=plan.flops_per_sample.model)
    facts["memory"]["total"] = plan.memory_total
    derived = ("fits", "communication_seconds", "bound", "seconds_per_step", "seconds_one_by_one", "steps", "days")
    facts.update({name: getattr(plan, name) for name in derived})
    return {**facts, "formulas": list(FORMULAS), "assumptions": assumptions(plan)}


def assumptions(plan: Plan) -> list[str]:
    """What was assumed rather than computed, one line each."""
    s, gpu, node, network = plan.settings, plan.gpu, plan.links.node, plan.links.network
    return [
        f"{s.gpu}: {gpu.gib:.1f} GiB, peak {getattr(gpu, s.dtype) / 1e12:.0f} TFLOP/s in {s.dtype} (data sheet)",
        f"the hardware runs at {s.utilisation:.0%} of that peak, recomputation included (--utilisation); not measured",
        f"a GPU reaches its node at {node / 1e9:.0f} GB/s and the network at {network / 1e9:.0f} GB/s each way, which is"
        f" {s.link_utilisation:.0%} of the data sheets' or yours (--link-utilisation); not measured",
        f"nodes of {plan.sharding.ranks_per_node} GPUs; a ring enters and leaves a node through the adapters of all its GPUs"
        " that take part; no latency",
        "communication goes on beside computation (FSDP2 gathers and reduces one layer while another computes), and within"
        " nodes beside that between nodes",
        f"a sample: {s.prompt_tokens} prompt tokens, {s.image_tokens} of them one image, and {s.response_tokens}"
        f" response tokens in one turn; {plan.row_tokens} tokens as a training row",
        f"{s.supervised:.0%} of the response is supervised (mask noise with t uniform in (0, 1])",
        f"{s.real_tokens:.0%} of the positions of packed rows are real tokens"
        if s.packing
        else "a row is as long as its sample; a short one uses a GPU less well, which is not counted",
        "attention: "
        + (
            f"a dense mask, kept by each layer in {s.dtype}; the FLOPs are still those of visible pairs"
            if s.dense_mask
            else "masked tiles are skipped (flex) and no mask is kept"
        ),
        f"{s.samples:g} samples, seen once, at one block size",
        "memory is that of full rows of --max-length; fragmentation and the CUDA context are left out",
        "data loading, checkpoints and validation take no time",
    ]


def _communication(plan: Plan) -> list[str]:
    """Lines about what a GPU receives in a step."""
    return [
        f"  {words:<24}{plan.communication[kind].alone:9.2f} s for {getattr(plan.traffic, kind) / 1e9:.1f} GB"
        for kind, words in COLLECTIVES.items()
        if getattr(plan.traffic, kind)
    ]


def render(plan: Plan) -> str:
    """Render the plan as text for a terminal."""
    s, parameters, flops, sharding = plan.settings, plan.parameters, plan.flops_per_sample, plan.sharding
    rows = f"rows of {s.max_length} tokens" if s.packing else f"a row per sample, at most {s.max_length} tokens"
    lines = [
        f"{s.model} on {s.gpus} x {s.gpu}, {s.dtype}, B = {s.block_size}, {rows}, activation"
        f" checkpointing {'on' if s.activation_checkpointing else 'off'}",
        f"{sharding.replicas} replica(s), each sharded over {sharding.shards} GPU(s); gradients reduced once a"
        f" {'step' if s.defer_fsdp_grad_sync else 'microbatch'}",
        "",
        f"parameters          {parameters.total:,} ({parameters.vision:,} in the vision tower)",
        "",
        "memory per GPU",
        *(f"  {name:<24}{value / GIB:9.2f} GiB" for name, value in plan.memory.items()),
        f"  {'total':<24}{plan.memory_total / GIB:9.2f} GiB of {plan.gpu.gib:.1f}:"
        f" {'fits' if plan.fits else 'DOES NOT FIT'}",
        "",
        "work of a GPU in a step",
        f"  FLOPs of a sample       {flops.model / 1e12:9.2f} TFLOP (text {flops.text / flops.forward:.0%}, attention"
        f" {flops.attention / flops.forward:.0%}, LM head {flops.head / flops.forward:.0%}, vision"
        f" {flops.vision / flops.forward:.0%})",
        f"  FLOPs                   {plan.flops_per_gpu / 1e12:9.2f} TFLOP, recomputation included",
        f"  tokens                  {plan.tokens_per_gpu:9.0f} in {plan.microbatches} microbatch(es) of {s.local_batch_size}"
        f" row(s) of {s.samples_per_row} sample(s)",
        f"  computation             {plan.compute_seconds:9.2f} s",
        *_communication(plan),
        f"  time per step           {plan.seconds_per_step:9.2f} s, bound by {plan.bound}; {plan.seconds_one_by_one:.2f} s"
        " if nothing overlaps",
        f"  {s.samples:.3g} samples{'':<8}{plan.days:13.2f} days ({plan.steps:,.0f} steps of {s.global_batch_size} samples)",
    ]
    if s.packing and plan.tokens_per_gpu < s.max_length:
        lines.append(
            f"  note: a GPU gets {plan.tokens_per_gpu:.0f} tokens a step, fewer than one row of {s.max_length}; a larger"
            " --global-batch-size or fewer --gpus would use them better"
        )
    if plan.advice:
        why = "it does not fit" if not plan.fits else f"{plan.bound} takes longest"
        lines += ["", f"what to change, as {why}", *(f"  {x}" for x in plan.advice)]
    lines += ["", "formulas (b: bytes of the compute dtype, G: GPUs, N: parameters)", *(f"  {x}" for x in FORMULAS)]
    lines += ["", "assumptions", *(f"  {x}" for x in assumptions(plan))]
    return "\n".join(lines) + "\n"
