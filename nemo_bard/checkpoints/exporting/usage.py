"""The parts of a model card that say how to use the model."""

from __future__ import annotations

from nemo_bard import __version__

LOADING = """\
import nemo_bard  # tells transformers about the architecture
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{name}"
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
processor = AutoProcessor.from_pretrained(folder)
"""
LOADING_ALONE = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{name}"
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
"""
OWN_CODE = """\
`trust_remote_code=True` runs the Python files of this folder: read them, or pin a revision. They are generated from nemo-bard {version}
and need torch and transformers alone; where `nemo_bard` is imported, its code runs and theirs does not.
"""
ASKING = """\
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
    needs = "torch and transformers >= 5.18" if self_contained else "the package nemo-bard, which brings transformers 5"
    loading = (LOADING_ALONE if self_contained else LOADING).replace("{name}", name)
    own = "\n" + OWN_CODE.replace("{version}", __version__) if self_contained else ""
    return f"## Generate\n\nNeeds {needs}.\n\n```python\n{loading}{ASKING}```\n{own}"


def serve_section(name: str) -> str:
    """How to serve; ``name`` is the folder's."""
    return (
        "## Serve\n\nWith nemo-bard, through vLLM where it is installed, else with a small server for one user:\n\n"
        f"```bash\nnemo-bard serve {name}\n```\n"
    )
