"""A folder's own code and the installed package in one process: ``python plain_both.py FOLDER OUT``."""

import json
import sys
from pathlib import Path


def main(folder, out):
    import torch

    torch.set_num_threads(1)
    from transformers import AttentionInterface, AutoModelForImageTextToText

    ids = torch.randint(300, (1, 12), generator=torch.Generator().manual_seed(0))

    def ask(model):
        return model.generate(ids, max_new_tokens=16, eos_token_id=-1).tolist()

    def about(model):
        return {"model": type(model).__module__, "config": type(model.config).__module__, "ids": ask(model)}

    own = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    found = {"own": about(own)}
    import nemo_bard

    for trust in (None, False, True):
        loaded = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=trust)
        found[f"trust {trust}"] = about(loaded)
    found["direct"] = about(nemo_bard.BardVLForConditionalGeneration.from_pretrained(folder))
    found["own again"] = about(own)

    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    second = get_class_from_dynamic_module("modeling_bard_vl.BardVLForConditionalGeneration", folder)
    found["own after the package"] = about(second.from_pretrained(folder))
    registered = AttentionInterface()
    found["backends"] = {name: registered[name].__module__ for name in registered if name.startswith("bard")}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
