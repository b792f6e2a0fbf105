"""Layouts: what the columns of a published or own data set mean, as functions from a row to a ``Record``.

``LAYOUTS`` has them by name. A package adds its own through the entry point group ``nemo_bard.layouts``, or a user names a
function by its dotted name. A layout may say with ``layouts.row.layout`` which columns it wants, so that it is found by them.
"""

from nemo_bard.data.layouts.registry import LAYOUTS, Layout, check_columns, detect, lay_out

__all__ = ["LAYOUTS", "Layout", "check_columns", "detect", "lay_out"]
