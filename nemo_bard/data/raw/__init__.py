"""Raw data: files of many formats as rows, cut into units that processes can share out among them."""

from nemo_bard.base.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "RawSource": "source",
        "Unit": "unit",
        "choose_layout": "source",
        "find_units": "find",
        "open_unit": "find",
        "read_unit": "find",
    },
)
