"""Asks a checkpoint folder that brings its own code; needs transformers and torch alone.

``python plain_answers.py FOLDER CASES OUT [BLOCKED,...]``: packages named last cannot be imported.
"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class Blocked(MetaPathFinder):
    """Makes packages look as if they were not installed."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def picture(seed, height=64, width=96):
    import torch
    from PIL import Image

    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def clip(seed, frames=6):
    import torch

    return torch.randint(
        256, (frames, 3, 64, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    ).numpy()


def encode(processor, prompts):
    """A batch of prompts, each a list of ``["text", TEXT]``, ``["image", SEED]`` and ``["video", SEED]``."""
    parts = [
        [{"type": kind, **({"text": value} if kind == "text" else {})} for kind, value in prompt] for prompt in prompts
    ]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        for content in parts
    ]
    found = {
        f"{kind}s": [make(value) for prompt in prompts for one, value in prompt if one == kind]
        for kind, make in (("image", picture), ("video", clip))
    }
    media = {name: values for name, values in found.items() if values}
    return processor(
        text=texts, padding=True, padding_side="left", return_tensors="pt", do_sample_frames=False, **media
    )


def answer(model, processor, case):
    """What ``generate`` answers: ids and counts, or the text of an error."""
    import torch

    batch = encode(processor, case["prompts"])

    def generate(**kwargs):
        generator = None if case.get("seed") is None else torch.Generator().manual_seed(case["seed"])
        return model.generate(generator=generator, **kwargs, **case["settings"])

    before = {name: getattr(model.config, name) for name in case.get("config", ())}
    vars(model.config).update(case.get("config", {}))
    try:
        out = generate(inputs=batch, return_dict_in_generate=True)
        same = torch.equal(out.sequences, generate(**batch))
    except ValueError as error:
        return f"ValueError: {error}"
    finally:
        vars(model.config).update(before)
    return {
        "ids": out.sequences.tolist(),
        "lengths": out.lengths.tolist(),
        "steps": out.block_step_counts.tolist(),
        "same": same,
    }


def main(folder, cases, out):
    import torch

    torch.set_num_threads(1)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    found = {"answers": [answer(model, processor, case) for case in json.loads(Path(cases).read_text())]}
    again = Path(out).with_name("saved again")
    model.save_pretrained(again)
    processor.save_pretrained(again)
    found["files"] = sorted(path.name for path in again.iterdir())
    twin = AutoModelForImageTextToText.from_pretrained(again, trust_remote_code=True)
    case = json.loads(Path(cases).read_text())[0]
    found["again"] = answer(twin, AutoProcessor.from_pretrained(again, trust_remote_code=True), case)
    found["class"] = type(model).__module__
    found["backend"] = type(model).decoding_attention
    found["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[4:]:
        sys.meta_path.insert(0, Blocked(sys.argv[4].split(",")))
    main(*sys.argv[1:4])
