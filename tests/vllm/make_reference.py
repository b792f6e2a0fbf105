"""What ``model.generate`` answers, for the tests of the vLLM plugin to compare with; runs where nemo_automodel is.

``python tests/vllm/make_reference.py CHECKPOINT OUT [--causal]`` writes images, clips and ``reference.json`` into OUT; with
``--causal`` also a copy of the checkpoint whose context is causal, as OUT/checkpoint.
"""

import argparse
import json
from pathlib import Path

import torch
import videos
from videos import Video

from nemo_bard.data.digits import make_digits
from nemo_bard.data.encode import encode_prompts
from nemo_bard.evaluation.responder import load_checkpoint

IMAGES = 24
LONG = "Read the digits of the picture above row by row, from the left to the right. " * 6
SETTINGS = {
    "defaults": {},
    "static": {"remasking_strategy": "low_confidence_static", "denoising_steps": 3},
    "entropy": {"remasking_strategy": "entropy_bound", "entropy_bound": 0.4},
    "few_steps": {"confidence_threshold": 0.99, "denoising_steps": 2},
    "revision": {"confidence_threshold": 0.3, "edit_threshold": 0.5, "max_post_edit_steps": 3},
    "masks_allowed": {"suppress_mask_token": False, "confidence_threshold": 0.7},
    "drawn": {"temperature": 0.7, "seed": 5},
    "drawn_filtered": {"temperature": 1.0, "top_k": 7, "top_p": 0.9, "seed": 2**40 + 3, "confidence_threshold": 0.2},
    "drawn_revised": {
        "temperature": 1.0,
        "seed": 11,
        "confidence_threshold": 0.2,
        "edit_threshold": 0.4,
        "max_post_edit_steps": 2,
    },
    "drawn_by_entropy": {"temperature": 1.5, "seed": 12, "remasking_strategy": "entropy_bound", "top_k": 20},
    "short": {"max_new_tokens": 13},
}


def user(*parts):
    return {"role": "user", "content": [typed(part) for part in parts]}


def typed(part):
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "video", "video": part.number} if isinstance(part, Video) else {"type": "image", "image": part[0]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def grown(samples, ask):
    """Conversations that go on from the model's own answers, at several places within a page of the cache."""
    for index in range(4):
        question = "Read the digits. " * (5 * index) + samples[index]["question"]
        first = ask("first", [user((index,), question)], {"max_new_tokens": 32 + 8 * index})
        ask(
            "grown",
            [user((index,), question), assistant(first["text"]), user((index + 1,), samples[index + 1]["question"])],
            {"confidence_threshold": 0.9},
        )


def with_videos(samples, ask):
    """Clips alone, beside an image and in conversations that go on from the model's own answers."""
    settings, question = {"confidence_threshold": 0.9}, samples[0]["question"]
    for number in range(len(videos.CLIPS)):
        ask("video", [user(Video(number), question)], settings)
    ask("video", [user(Video(0), question)], SETTINGS["drawn_filtered"])
    for number in range(videos.SHORT):
        parts = [Video(number), (number,)]
        ask("video_and_image", [user(*parts[:: 1 - number % 2 * 2], question)], settings)
    for number in range(0, videos.SHORT, 2):
        turns = [user(Video(number), "Read the digits. " * number + question)]
        first = ask("video_first", turns, {**settings, "max_new_tokens": 24 + 4 * number})
        ask("video_turns", [*turns, assistant(first["text"]), user(Video(number + 1), question)], settings)


def raw(model):
    """Prompts without turns: blocks are counted from the start, and from the end of the prompt on. Ids only."""
    ids = torch.arange(3, 131) % 500
    # The answers of the last two end where a page of 32 does: with their last block, and within it.
    for length, most, more in ((45, 48, 0), (64, 48, 0), (71, 48, 0), (48, 48, 5), (51, 45, 5)):
        settings = {"max_new_tokens": most, "confidence_threshold": 0.9}
        first = ids_of(model.generate({"input_ids": ids[None, :length]}, eos_token_id=-1, **settings))
        longer = [*ids[:length].tolist(), *first, *ids[:more].tolist()]
        then = ids_of(model.generate({"input_ids": torch.tensor([longer])}, eos_token_id=-1, **settings))
        common = {"prompt": None, "images": [], "videos": [], "settings": {**settings, "ignore_eos": True}}
        yield {"name": "raw", "prompt_ids": ids[:length].tolist(), "ids": first, **common}
        yield {"name": "raw_grown", "prompt_ids": longer, "ids": then, **common}


def ids_of(sequences):
    return sequences[0].tolist()


def conversations(samples):
    """Name, turns and settings of cases; an image is a tuple that holds its number."""
    for index, sample in enumerate(samples):
        yield "image", [user((index,), sample["question"])], {"confidence_threshold": 0.9}
    for index in range(0, 8, 2):
        one, two = samples[index], samples[index + 1]
        yield (
            "turns",
            [user((index,), one["question"]), assistant(one["answer"]), user((index + 1,), two["question"])],
            {"confidence_threshold": 0.9},
        )
        yield "two_images", [user((index,), (index + 1,), two["question"])], {"confidence_threshold": 0.9}
    for name, settings in SETTINGS.items():
        for index in range(3):
            yield name, [user((index,), samples[index]["question"])], settings
    yield "text", [user("Read the digits.")], {}
    yield "text", [user("Which digits are shown?"), assistant("12\n34"), user("Read the digits.")], {}
    for index in range(3):
        yield "long", [user((index,), LONG + samples[index]["question"])], {"confidence_threshold": 0.9}


def answer(model, processor, media, turns, settings):
    """The record of a case."""
    parts = [part for turn in turns for part in turn["content"]]
    filled = [{**turn, "content": [fill(part, media) for part in turn["content"]]} for turn in turns]
    batch = encode_prompts(processor, [filled])
    given = {"max_new_tokens": 64, **settings}
    seed = given.pop("seed", None)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found = model.generate(batch, **given, generator=generator, return_dict_in_generate=True)
    return {
        "prompt": processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True),
        "images": [part["image"] for part in parts if "image" in part],
        "videos": [part["video"] for part in parts if "video" in part],
        "settings": settings,
        "prompt_ids": batch["input_ids"][0].tolist(),
        "ids": found.sequences[0, : int(found.lengths[0])].tolist(),
        "text": processor.decode(found.sequences[0, : int(found.lengths[0])], skip_special_tokens=True),
        "steps": found.block_step_counts[0].tolist(),
    }


def fill(part, media):
    """A typed part with the image or the file in the place of its number."""
    kind = part["type"]
    return part if kind == "text" else {"type": kind, kind: media[kind][part[kind]]}


def causal_copy(checkpoint, folder):
    """The same weights in a checkpoint whose context is causal."""
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "context_attention": "causal"}))
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--causal", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = causal_copy(args.checkpoint, args.out / "checkpoint") if args.causal else args.checkpoint
    data = make_digits("test", IMAGES, rows=4, columns=4)
    samples, images = [], []
    for index in range(IMAGES):
        image, text = data[index]["conversation"][0]["content"]
        image["image"].save(args.out / f"{index}.png")
        images.append(image["image"].convert("RGB"))
        samples.append({"question": text["text"], "answer": data[index]["answer"]})
    model, processor = load_checkpoint(checkpoint, device="cpu")
    clips = videos.write_clips(args.out, images)
    for clip in clips:
        videos.save_read(clip, processor.video_processor)
    media = {"image": images, "video": [str(clip) for clip in clips]}
    cases = []

    def ask(name, turns, settings):
        cases.append({"name": name, **answer(model, processor, media, turns, settings)})
        return cases[-1]

    for case in conversations(samples):
        ask(*case)
    grown(samples, ask)
    with_videos(samples, ask)
    cases.extend(raw(model))
    reference = {"checkpoint": str(checkpoint.resolve()), "block_size": model.config.block_size, "cases": cases}
    (args.out / "reference.json").write_text(json.dumps(reference))


if __name__ == "__main__":
    main()
