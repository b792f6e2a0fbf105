"""Where media of published rows go."""

import pytest

from nemo_bard.data.placement import place_media
from nemo_bard.data.sample import Record, RejectedError


def _record(*messages, **media):
    return Record(messages=[{"role": role, "content": content} for role, content in messages], **media)


def test_as_many_placeholders_as_media_stay_where_they_are():
    record = _record(("user", "a <image> b <image>"), ("assistant", "c"), images=["1.png", "2.png"])
    assert place_media(record) == list(record.messages)


def test_without_placeholders_media_go_before_the_first_text_of_the_user():
    record = _record(("system", "s"), ("user", "why?"), ("assistant", "c"), ("user", "and?"), images=["1", "2"])
    assert [m["content"] for m in place_media(record)] == ["s", "<image><image>\nwhy?", "c", "and?"]
    assert record.messages[1]["content"] == "why?"
    parts = [{"type": "text", "text": "why?"}]
    record = _record(("user", parts), ("assistant", "c"), images=["1"], videos=["v"])
    assert place_media(record)[0]["content"] == [{"type": "image"}, {"type": "video"}, *parts]


def test_parts_with_a_source_of_their_own_are_no_placeholders():
    parts = [{"type": "image", "image": "own.png"}, {"type": "image"}, {"type": "text", "text": "?"}]
    record = _record(("user", parts), ("assistant", "c"), images=["1"])
    assert place_media(record)[0]["content"] == parts


@pytest.mark.parametrize(("text", "images"), [("<image><image>", ["1"]), ("<image>", []), ("<image>", ["1", "2"])])
def test_other_numbers_are_refused(text, images):
    with pytest.raises(RejectedError) as error:
        place_media(_record(("user", text), ("assistant", "c"), images=images))
    assert error.value.kind == "placeholders"


def test_media_need_a_turn_of_the_user():
    with pytest.raises(RejectedError, match="no turn of the user"):
        place_media(_record(("assistant", "c"), images=["1"]))
