"""Conversations: readers, how they become training rows, and which rows share a batch."""

from nemo_bard.base.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "BlockDiffusionCollator": "collate",
        "DigitsDataset": "digits",
        "JsonlDataset": "jsonl",
        "MediaSource": "media",
        "MixtureDataset": "mixture.dataset",
        "PackedDataset": "packing",
        "PreparedDataset": "prepared.dataset",
        "RowsDataset": "rows",
        "make_digits": "digits",
        "make_jsonl": "jsonl",
        "open_dataset": "readers",
        "parse_record": "conversation",
        "split_last_response": "conversation",
    },
)
