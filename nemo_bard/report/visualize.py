"""Writing a trace as a self-contained HTML page or as a GIF; the ending of the file decides."""

from __future__ import annotations

from pathlib import Path

from nemo_bard.report.gif import write_gif
from nemo_bard.report.page import render_page
from nemo_bard.report.trace import Trace


def write_visualization(trace: Trace, path: str | Path) -> None:
    """Write a trace as ``.html`` or ``.gif``.

    Args:
        trace: What ``make_trace`` returned.
        path: File to write; its ending decides.

    Raises:
        ValueError: For another ending.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in (".html", ".htm"):
        path.write_text(render_page(trace), encoding="utf-8")
    elif suffix == ".gif":
        write_gif(trace, path)
    else:
        raise ValueError(f"a visualisation must end in .html or .gif, got {path}")
