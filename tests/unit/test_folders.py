"""What a checkpoint folder says that it is."""

import json

import pytest

from nemo_bard.base.folders import check_model_type, read_model_type, read_object


@pytest.mark.parametrize("kind", ["qwen3_vl", "bard_vl"])
def test_model_type_of_a_folder(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert read_model_type(tmp_path) == kind


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has no config.json; a Qwen3-VL or Bard-VL checkpoint folder is needed"),
        ("{", "config.json: not a JSON file"),
        ("\udcff", "config.json: not a JSON file"),
        ("[]", "config.json: must hold a JSON object, got list"),
        ("{}", "config.json: model_type is None, allowed are qwen3_vl, bard_vl"),
        ('{"model_type": "llama"}', "config.json: model_type is 'llama', allowed are qwen3_vl, bard_vl"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=said) as error:
        read_model_type(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_and_a_file_that_is_not(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_model_type(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "config.json")


def test_one_allowed_kind(tmp_path):
    with pytest.raises(ValueError, match="model_type is 'qwen3_vl', allowed is bard_vl"):
        check_model_type({"model_type": "qwen3_vl"}, tmp_path / "config.json", ["bard_vl"])
