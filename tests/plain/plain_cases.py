"""What is asked of the package and of a folder's own code, and how."""

import json
import os
import subprocess
from pathlib import Path

from plain_answers import answer

SCRIPT = Path(__file__).with_name("plain_answers.py")
LIMIT_S = 300
ONE = [["image", 1], ["text", "Read the digits."]]
TEXT = [["text", "Count the numbers of the grid."]]
TWO = [["image", 2], ["image", 3], ["text", "Which picture is red?"]]
VIDEO = [["video", 4], ["text", "Describe the video."]]


def cases():
    """Everything that decoding knows: each strategy, each engine, each kind of prompt, batches, draws."""
    from nemo_bard.generation.parameters import ENGINES, STRATEGIES

    long = {"max_new_tokens": 22, "eos_token_id": -1}
    found = [
        {"name": "one", "prompts": [ONE], "settings": long},
        {"name": "batch", "prompts": [ONE, TEXT, TWO], "settings": long},
        {"name": "video", "prompts": [VIDEO, TWO], "settings": long},
        {"name": "text", "prompts": [TEXT], "settings": long},
        {"name": "ends", "prompts": [ONE, TWO], "settings": {"max_new_tokens": 30}},
        {"name": "blocks of 8", "prompts": [ONE, TEXT], "settings": {**long, "block_size": 8}},
        {"name": "edits", "prompts": [ONE], "settings": {**long, "edit_threshold": 0.3, "max_post_edit_steps": 2}},
        {
            "name": "draws",
            "prompts": [ONE, TEXT],
            "settings": {**long, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
            "seed": 5,
        },
        {"name": "wrong name", "prompts": [ONE], "settings": {"remasking_strategy": "low_confidance_static"}},
    ]
    found += [
        {"name": name, "prompts": [ONE, TEXT], "settings": {**long, "remasking_strategy": name}} for name in STRATEGIES
    ]
    causal = {"context_attention": "causal"}
    found += [
        {
            "name": f"{name}, causal{' and drawn' if seed else ''}",
            "prompts": [ONE, TEXT],
            "settings": {**long, "remasking_strategy": name, "temperature": 1.0 if seed else 0.0},
            "config": causal,
            "seed": seed,
        }
        for name in STRATEGIES
        if STRATEGIES.get(name).by_next_token
        for seed in (None, 7)
    ]
    static = {"graph": {"cache_implementation": "static"}}
    found += [
        {"name": name, "prompts": [ONE, TWO], "settings": {**long, "decode_path": name, **static.get(name, {})}}
        for name in ENGINES
        if name != "fast"
    ]
    return found


def expected(folder, asked):
    """What the package answers."""
    from nemo_bard.evaluation.responder import load_checkpoint

    model, processor = load_checkpoint(folder, device="cpu")
    return [answer(model, processor, case) for case in asked]


def ask(python, folder, asked, where, *, blocked=(), environment=None, start_in=None):
    """What a folder's own code, or that of a name on the hub, answers in a fresh process, which starts in the folder."""
    file, out = where / "cases.json", where / "answers.json"
    file.write_text(json.dumps(asked))
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    given |= {"HF_MODULES_CACHE": str(where / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [python, "-P", SCRIPT, folder, file, out, *([",".join(blocked)] if blocked else [])]
    done = subprocess.run(
        list(map(str, words)),
        env={**given, **(environment or {})},
        cwd=start_in or folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


def differing(asked, found, wanted):
    """Names of the cases that were not answered alike."""
    return [case["name"] for case, mine, theirs in zip(asked, found, wanted, strict=True) if mine != theirs]
