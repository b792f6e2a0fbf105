"""vLLM with the plugin reads a folder that brings its own code as it reads any other, and runs none of that code."""

import json
import shutil

import pytest

from nemo_bard.checkpoints.self_contained import write_code

pytestmark = pytest.mark.vllm
READ = """
import json, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config import ModelConfig
found = {}
for trust in (False, True):
    config = ModelConfig(model=sys.argv[1], trust_remote_code=trust)
    model, _ = config.registry.resolve_model_cls(config.architectures, config)
    found[str(trust)] = [type(config.hf_config).__module__, model.__module__, config.hf_config.block_size]
print(json.dumps(found))
"""


def test_configuration_and_model_are_the_plugin_s(run_vllm, start, tmp_path):
    folder = tmp_path / "model v1.0"
    shutil.copytree(start, folder)
    write_code(folder)
    found = json.loads(run_vllm("-c", READ, folder).stdout.splitlines()[-1])
    mine = ["nemo_bard.serving.vllm.config", "nemo_bard.serving.vllm.model", 4]
    assert found == {"False": mine, "True": mine}
