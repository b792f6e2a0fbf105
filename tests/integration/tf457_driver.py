"""Run by transformers 4.57, which knows nothing of nemo_bard: ``python tf457_driver.py FOLDER IMAGE INPUTS OUT``.

Reads an export the way that released Bard-VL code does: classes of Qwen3-VL under the model type ``bard_vl``.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration, __version__

folder, image, inputs, out = sys.argv[1:]
torch.set_num_threads(1)


class Config(Qwen3VLConfig):
    model_type = "bard_vl"


class Model(Qwen3VLForConditionalGeneration):
    config_class = Config


model, loading = Model.from_pretrained(folder, dtype="auto", output_loading_info=True)
given = torch.load(inputs)
with torch.no_grad():
    logits = model.eval()(**given).logits
torch.save(logits, Path(out) / "logits.pt")
text, vision = model.config.text_config, model.config.vision_config
processor = AutoProcessor.from_pretrained(folder, use_fast=True)
messages = [
    {"role": "user", "content": [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "Read."}]}
]
batch = processor.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
torch.save(dict(batch), Path(out) / "batch.pt")
found = {
    "version": __version__,
    "loading": {key: sorted(map(str, value)) for key, value in loading.items()},
    "dtype": str(model.dtype),
    "config_dtype": str(model.config.dtype),
    "rope_theta": text.rope_theta,
    "rope_scaling": text.rope_scaling,
    "heads": [text.num_attention_heads, text.num_key_value_heads, text.head_dim],
    "layers": [text.num_hidden_layers, vision.depth],
    "deepstack": vision.deepstack_visual_indexes,
    "tied": model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr(),
    "ours": {key: getattr(model.config, key) for key in ("block_size", "mask_token_id", "context_attention")},
    "special_tokens": sorted(processor.tokenizer.all_special_tokens),
}
(Path(out) / "found.json").write_text(json.dumps(found))
