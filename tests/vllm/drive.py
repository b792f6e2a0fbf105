"""Answers the cases of a reference with vLLM, in a process of its own: ``drive.py REFERENCE OUT [ARGUMENT=JSON ...]``.

``rounds`` lists which cases are asked one after the other: names, or none for all; ``async`` turns asynchronous scheduling on, which vLLM turns off on a CPU.
Everything else are arguments of ``vllm.LLM``.
"""

import json
import sys
from pathlib import Path

SHARED = ("temperature", "top_k", "top_p", "seed")


def force_async():
    """Let the CPU platform keep asynchronous scheduling."""
    from vllm.platforms.cpu import CpuPlatform

    inner = CpuPlatform.check_and_update_config.__func__

    def checked(cls, config):
        inner(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(checked)


def request(case, folder):
    import videos
    from PIL import Image
    from vllm import SamplingParams

    settings = {"max_new_tokens": 64, **case["settings"]}
    shared = {name: settings.pop(name) for name in SHARED if name in settings}
    params = SamplingParams(
        max_tokens=settings.pop("max_new_tokens"),
        ignore_eos=settings.pop("ignore_eos", False),
        **{"temperature": 0.0, **shared},
        extra_args=settings or None,
    )
    prompt = {"prompt": case["prompt"]} if case["prompt"] else {"prompt_token_ids": case["prompt_ids"]}
    media = {
        "image": [Image.open(folder / f"{number}.png").convert("RGB") for number in case["images"]],
        "video": [videos.load_read(folder, number) for number in case["videos"]],
    }
    if found := {kind: items for kind, items in media.items() if items}:
        prompt["multi_modal_data"] = found
    return prompt, params


def main():
    reference_file, out, *given = sys.argv[1:]
    arguments = {name: json.loads(value) for name, _, value in (one.partition("=") for one in given)}
    folder = Path(reference_file).parent
    reference = json.loads(Path(reference_file).read_text())
    asked = arguments.pop("rounds", [None])
    rounds = [[case for case in reference["cases"] if names is None or case["name"] in names] for names in asked]
    if arguments.pop("async", False):
        force_async()
    from vllm import LLM

    engine = LLM(
        model=reference["checkpoint"],
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 1024,
            "limit_mm_per_prompt": {"image": 2, "video": 2},
            "enable_prefix_caching": False,
            **arguments,
        },
    )
    answers = []
    for cases in rounds:
        prompts, params = zip(*(request(case, folder) for case in cases), strict=True)
        answers.append([])
        for found in engine.generate(list(prompts), list(params), use_tqdm=False):
            answers[-1].append(
                {
                    "prompt_ids": list(found.prompt_token_ids),
                    "ids": list(found.outputs[0].token_ids),
                    "text": found.outputs[0].text,
                    "finish_reason": found.outputs[0].finish_reason,
                    "cached": found.num_cached_tokens,
                }
            )
    counters = {
        metric.name: metric.value
        for metric in (engine.get_metrics() if not arguments.get("disable_log_stats", True) else [])
        if hasattr(metric, "value")
    }
    Path(out).write_text(json.dumps({"rounds": asked, "answers": answers, "metrics": counters}))


if __name__ == "__main__":
    main()
