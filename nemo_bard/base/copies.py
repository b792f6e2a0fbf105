"""Modules that also run as copies: a checkpoint folder may bring the code of model and decoder along.

What a module hands to others under a name, such as an attention backend to transformers, has to have another name in a copy:
package and copies, which may be of other versions, would replace each other's.
"""

from __future__ import annotations

PACKAGE = "nemo_bard"


def is_copy(module: str) -> bool:
    """Whether the module with this ``__name__`` is a copy."""
    return module.partition(".")[0] != PACKAGE


def own_name(name: str, module: str) -> str:
    """Return ``name`` for a module of the package; for a copy with the part that transformers gives to copies, a hash or a commit.

    Args:
        name: What it is called in the package.
        module: ``__name__`` of the module.
    """
    return f"{name}_{module.split('.')[-2:][0]}" if is_copy(module) else name
