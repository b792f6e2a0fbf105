"""How many ids random replacements are drawn from: checked against the mask id and the embedding."""

from types import SimpleNamespace

import pytest

from nemo_bard.train.pbm import PBMRecipe


class Tokenizer:
    vocab_size = 10
    all_special_ids = (10,)

    def get_vocab(self):
        return {"word": 3, "<special>": 10}

    def convert_ids_to_tokens(self, number):
        return {3: "word"}[number]


def random_ids(mask, asked=None):
    return PBMRecipe._random_ids(
        SimpleNamespace(
            _model_config=SimpleNamespace(text_config=SimpleNamespace(vocab_size=12), mask_token_id=mask),
            processor=SimpleNamespace(tokenizer=Tokenizer()),
            noise=SimpleNamespace(num_random_ids=asked),
        )
    )


def test_it_is_what_the_recipe_says_else_the_tokenizers_size():
    assert (random_ids(10), random_ids(11, asked=11)) == (10, 11)


@pytest.mark.parametrize(
    ("mask", "asked", "message"),
    [
        (None, None, r"^model\.mask_token_id must be set, the checkpoint's config\.json has none$"),
        (3, None, r"^mask_token_id 3 is the text token 'word'; choose a row of the embedding that no text uses$"),
        (12, None, r"^mask_token_id must be a row of the embedding, 0 to 11, got 12$"),
        (11, 12, r"^noise\.num_random_ids=12 must be at most 11: the embedding has 12 rows and mask_token_id is 11$"),
    ],
)
def test_what_does_not_fit_is_one_line(mask, asked, message):
    with pytest.raises(ValueError, match=message):
        random_ids(mask, asked)
