import numpy as np
import pytest

from nemo_bard.data.digits import (
    QUESTIONS,
    SPLITS,
    DigitsConfig,
    DigitsDataset,
    _cells,
    _scans,
    make_digits,
    score,
    split_indices,
)


def pixels(sample):
    return np.asarray(sample["conversation"][0]["content"][0]["image"])


def test_splits_share_no_scan_and_cover_all():
    drawn = [split_indices(split) for split in SPLITS]
    assert sorted(i for part in drawn for i in part) == list(range(len(_scans()[1])))


def test_splits_share_no_picture():
    images = _scans()[0]
    train = {images[i].tobytes() for i in split_indices("train")}
    assert not train & {images[i].tobytes() for i in split_indices("test")}


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_every_digit(split):
    assert set(_scans()[1][list(split_indices(split))]) == set(range(10))


def test_sample_is_a_pure_function_of_seed_split_and_index():
    first, second = make_digits("train", 20, seed=3), make_digits("train", 5000, seed=3)
    for index in (0, 7, 19):
        a, b = first[index], second[index]
        assert a["answer"] == b["answer"]
        assert a["sample_index"] == index
        assert np.array_equal(pixels(a), pixels(b))
    assert first[0]["answer"] != first[1]["answer"]
    assert first[0]["answer"] != make_digits("train", 20, seed=4)[0]["answer"]
    assert first[0]["answer"] != make_digits("test", 20, seed=3)[0]["answer"]


def test_picture_shows_the_digits_of_the_answer_in_order():
    sample = make_digits("test", 4, rows=2, columns=3, cell_size=16, margin=0, column_separator=" ")[1]
    image, digits = pixels(sample), sample["answer"].split()
    assert image.shape == (32, 48, 3)
    assert len(digits) == 6
    cells, labels = _cells(16), _scans()[1]
    for place, digit in enumerate(digits):
        row, column = divmod(place, 3)
        cell = image[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16, 0]
        shown = {int(labels[i]) for i in split_indices("test") if np.array_equal(cells[i], cell)}
        assert shown == {int(digit)}


def test_conversation_has_the_contracts_form():
    sample = make_digits("train", 3)[2]
    user, assistant = sample["conversation"]
    assert user["role"] == "user"
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    assert user["content"][1]["text"] in QUESTIONS
    assert assistant == {"role": "assistant", "content": [{"type": "text", "text": sample["answer"]}]}
    assert [len(row) for row in sample["answer"].split("\n")] == [4, 4, 4, 4]


def test_jitter_shifts_the_digit_inside_its_cell():
    plain = DigitsDataset("train", 40, config=DigitsConfig(rows=1, columns=1, margin=4))
    moved = DigitsDataset("train", 40, config=DigitsConfig(rows=1, columns=1, margin=4, jitter=4))
    shifts = set()
    for index in range(40):
        still, shifted = pixels(plain[index])[..., 0], pixels(moved[index])[..., 0]
        assert plain[index]["answer"] == moved[index]["answer"]
        rows, columns = np.nonzero(still < 255)
        by = np.argwhere(shifted < 255).min(0) - (rows.min(), columns.min())
        assert np.array_equal(np.roll(still, tuple(by), (0, 1)), shifted)
        shifts.add(tuple(by))
    assert len(shifts) > 20
    assert np.abs(list(shifts)).max() == 4


def test_curriculum_grows_from_one_digit_to_the_full_grid():
    data = make_digits("train", 500, curriculum=400)
    sizes = [tuple(np.asarray(pixels(data[i]).shape[:2]) // 32) for i in range(500)]
    assert set(sizes[:100]) == {(1, 1)}
    assert set(sizes[100:200]) == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert {size for size in sizes[300:400] if 4 in size}
    assert set(sizes[400:]) == {(4, 4)}
    for index in (0, 150, 399, 450):
        assert tuple(sizes[index]) == (len(rows := data[index]["answer"].split("\n")), len(rows[0]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "dev"}, "split must be one of"),
        ({"num_samples": 0}, "num_samples must be"),
        ({"seed": -1}, "seed must be"),
        ({"rows": 0}, "rows must be"),
        ({"cell_size": 4}, "cell_size must be"),
        ({"jitter": 4}, "jitter must be at most margin = 3"),
        ({"margin": 13}, "margin must be at most"),
        ({"row_separator": "0"}, "row_separator must not hold a digit"),
        ({"questions": []}, "questions must be"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_bad_values_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_digits(**kwargs)


def test_index_outside_the_data_set_ends_iteration():
    assert len(list(DigitsDataset("test", 3, config=DigitsConfig(rows=1)))) == 3


@pytest.mark.parametrize(
    ("prediction", "exact", "accuracy"),
    [
        ("1 2\n3 4", 1.0, 1.0),
        (" 1 2\n3 4 ", 1.0, 1.0),
        ("1 2 3 4", 0.0, 1.0),
        ("1 2\n3 5", 0.0, 0.75),
        ("1 2", 0.0, 0.5),
        ("1 2\n3 4 5", 0.0, 0.8),
        ("", 0.0, 0.0),
        ("no digits", 0.0, 0.0),
    ],
)
def test_score(prediction, exact, accuracy):
    assert score(prediction, "1 2\n3 4") == {"exact_match": exact, "digit_accuracy": accuracy}


def test_score_needs_a_digit_in_the_reference():
    with pytest.raises(ValueError, match="reference must hold a digit"):
        score("1", "none")
