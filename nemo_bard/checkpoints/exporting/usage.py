"""The parts of a model card that say how to use the model."""

from __future__ import annotations

LOADING = """\
import nemo_bard  # tells transformers about the architecture
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{name}"
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
"""
LOADING_ALONE = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{name}"
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", trust_remote_code=True)
"""
ASKING = """\
processor = AutoProcessor.from_pretrained(folder)
messages = [
    {"role": "user", "content": [{"type": "image", "image": "image.png"}, {"type": "text", "text": "What is this?"}]}
]
batch = processor.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
ids = model.generate(batch, max_new_tokens=256)  # response tokens only
print(processor.tokenizer.batch_decode(ids, skip_special_tokens=True)[0])
"""


def generate_section(name: str, *, self_contained: bool) -> str:
    """How to generate.

    Args:
        name: Of the folder.
        self_contained: Whether the folder has its own code.
    """
    needs = "transformers 5 alone" if self_contained else "the package nemo-bard, which brings transformers 5"
    loading = (LOADING_ALONE if self_contained else LOADING).replace("{name}", name)
    return f"## Generate\n\nNeeds {needs}.\n\n```python\n{loading}{ASKING}```\n"


def serve_section(name: str) -> str:
    """How to serve; ``name`` is the folder's."""
    return (
        "## Serve\n\nWith nemo-bard, through vLLM where it is installed, else with a small server for one user:\n\n"
        f"```bash\nnemo-bard serve {name}\n```\n"
    )
