"""Tasks of lmms-eval with local images: digits to read, read again in a second round, and chosen among four."""

from __future__ import annotations

import json
from pathlib import Path

UTILS = """
def visual(doc):
    return [doc["image"]]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def rounds(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    if round_idx is None:
        return messages(doc)
    if round_idx == 3 or previous_output[-1] != previous_output[0]:
        return None, True, previous_output, previous_round_info
    turns = messages(doc)
    turns += [{"role": "assistant", "content": [{"type": "text", "text": previous_output[-1]}]}]
    turns += [{"role": "user", "content": [{"type": "text", "text": doc["question"]}]}]
    return turns, False, previous_output, (previous_round_info or 0) + 1


def score(doc, results):
    return {"right": float(results[0] == doc["answer"])}


def score_rounds(doc, results):
    found = results[0] if isinstance(results[0], list) else results
    return {"right": float(found[0] == doc["answer"]), "rounds": len(found)}
"""
COMMON = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/digits.parquet}}}}
test_split: test
metadata: {{version: 0.0}}
"""
TASKS = {
    "digits_read": """
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 24, temperature: 0, top_p: 0, do_sample: false, num_beams: 1}}
process_results: !function utils.score
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
""",
    "digits_rounds": """
output_type: generate_until_multi_round
doc_to_messages: !function utils.rounds
doc_to_visual: !function utils.visual
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 24}}
process_results: !function utils.score_rounds
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
  - {{metric: rounds, aggregation: mean, higher_is_better: true}}
""",
    "digits_choice": """
output_type: multiple_choice
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_choice: choices
doc_to_target: target
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
}


def write_tasks(folder: Path, samples: int = 8) -> Path:
    """Write the tasks and a parquet file with their images; returns the folder for ``--include_path``."""
    import datasets

    from nemo_bard.data.digits import DigitsDataset

    folder.mkdir(parents=True, exist_ok=True)
    data = DigitsDataset("test", samples + 3)
    rows = [read_sample(data[i]) for i in range(samples + 3)]
    answers = [answer for _, _, answer in rows]
    columns = {
        "image": [image for image, _, _ in rows[:samples]],
        "question": [question for _, question, _ in rows[:samples]],
        "answer": answers[:samples],
        "choices": [answers[i : i + 4] if i % 2 else answers[i : i + 4][::-1] for i in range(samples)],
        "target": [0 if i % 2 else 3 for i in range(samples)],
    }
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(folder / "digits.parquet")
    (folder / "utils.py").write_text(UTILS)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text((f"task: {name}" + text + COMMON).format(folder=folder))
    return folder


def read_sample(sample):
    """Image, question and answer of a conversation."""
    user, assistant = sample["conversation"]
    image = next(part["image"] for part in user["content"] if part["type"] == "image")
    question = next(part["text"] for part in user["content"] if part["type"] == "text")
    return image, question, assistant["content"][0]["text"]


def read_run(folder: Path) -> tuple[dict, dict[str, list[dict]]]:
    """Results of the only run below a folder, and its samples by task."""
    (results,) = folder.rglob("*_results.json")
    samples = {}
    for file in folder.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[file.stem.partition("_samples_")[2]] = sorted(lines, key=lambda line: line["doc_id"])
    return json.loads(results.read_text()), samples
