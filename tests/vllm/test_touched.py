"""What we touch of vLLM is where it was."""

import pytest

pytestmark = pytest.mark.vllm

MOVED = """
from nemo_bard.upstream import touched, vllm
print([line for row in vllm.TOUCHED if (line := touched.what_moved(row))])
"""


def test_it_is_where_it_was(run_vllm):
    assert run_vllm("-c", MOVED).stdout.strip().splitlines()[-1] == "[]"
