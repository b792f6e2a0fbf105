"""What a run or a decoding was like: tables and curves of a run directory, a response step by step as a page or a GIF."""

from nemo_bard.base.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "CONFIDENCE_COLORS": "colors",
        "Change": "trace",
        "STEP_COLORS": "colors",
        "Step": "trace",
        "Trace": "trace",
        "blend": "colors",
        "ink_on": "colors",
        "make_trace": "trace",
        "write_report": "run",
        "write_visualization": "visualize",
    },
)
