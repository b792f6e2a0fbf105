"""A picture of answers: the image, the answer, and in which denoising step each token was fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_bard.data.conversation import split_last_response
from nemo_bard.data.encode import encode_prompts
from nemo_bard.generation.settings import BardGenerationConfig


def fixed_steps(history: list[Any], row: int, length: int, block_size: int) -> list[int]:
    """Step (from 1, within its block) in which each token of a row was last fixed.

    Args:
        history: ``StepRecord`` list of a decoded batch.
        row: Row of the batch.
        length: Response tokens of the row.
        block_size: ``B``.

    Returns:
        One step per token.
    """
    steps = [0] * length
    for record in history:
        if row in record.rows:
            fixed = record.fixed[record.rows.index(row)].tolist()
            for column, is_fixed in enumerate(fixed):
                position = record.block * block_size + column
                if is_fixed and position < length:
                    steps[position] = record.step + 1
    return steps


def draw_answers(
    model: Any,
    processor: Any,
    samples: list[dict[str, Any]],
    *,
    generation_config: BardGenerationConfig,
    path: Path,
) -> None:
    """Decode samples and draw each one's image and its answer, tokens coloured by the step in which they were fixed.

    Args:
        model: A BARD model.
        processor: Its processor.
        samples: Samples of a data set; the first image of each is shown.
        generation_config: Decoding settings.
        path: PNG to write.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    block_size = generation_config.block_size or model.config.block_size
    decoded = []
    for sample in samples:
        prompt, reference = split_last_response(sample["conversation"])
        batch = encode_prompts(processor, [prompt]).to(model.device)
        output = model.generate(
            batch, generation_config=generation_config, return_dict_in_generate=True, output_history=True
        )
        length = int(output.lengths[0])
        image = next(
            part["image"]
            for turn in prompt
            if isinstance(turn["content"], list)
            for part in turn["content"]
            if part["type"] == "image"
        )
        tokens = [processor.tokenizer.decode([i]) for i in output.sequences[0, :length].tolist()]
        steps = fixed_steps(output.history, 0, length, block_size)
        decoded.append((image, reference, tokens, steps, float(output.tokens_per_denoising_forward[0])))

    most = max((max(steps, default=1) for *_, steps, _ in decoded), default=1)
    shades = colormaps["viridis_r"].resampled(max(most, 2))
    per_line = 4 * block_size if block_size <= 4 else 2 * block_size if block_size <= 8 else block_size
    figure = Figure(figsize=(12, 2.6 * len(decoded) + 0.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(decoded), 2, width_ratios=[1, 3.6], squeeze=False)
    for (left, right), (image, reference, tokens, steps, tpf) in zip(axes, decoded, strict=True):
        left.imshow(image)
        left.set_axis_off()
        text = "".join(t for t in tokens if not t.startswith("<|"))
        verdict = "right" if text.strip() == reference.strip() else f"wrong, should be {reference!r}"
        right.set_title(f"{verdict}   {len(tokens)} tokens, {tpf:.1f} per forward", loc="left", fontsize=10)
        lines = -(-len(tokens) // per_line)
        for index, (token, step) in enumerate(zip(tokens, steps, strict=True)):
            column, line = index % per_line, index // per_line
            x = column + 0.35 * (column // block_size)
            colour = shades((step - 1) / max(most - 1, 1))
            right.add_patch(Rectangle((x, -line), 0.92, 0.85, facecolor=colour, edgecolor="none"))
            luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
            shown = {"\n": "\\n", " ": "\u2423"}.get(token, "end" if token.startswith("<|") else token)
            right.text(
                x + 0.46,
                -line + 0.42,
                shown,
                ha="center",
                va="center",
                fontsize=8 if len(shown) > 2 else 11,
                color="black" if luminance > 0.55 else "white",
            )
        width = per_line + 0.35 * ((per_line - 1) // block_size)
        right.set_xlim(-0.1, width)
        right.set_ylim(-max(lines, 3) + 0.9, 1.05)
        right.set_axis_off()
    norm = BoundaryNorm([step + 0.5 for step in range(max(most, 2) + 1)], max(most, 2))
    bar = figure.colorbar(ScalarMappable(norm, shades), ax=axes[:, 1], ticks=range(1, most + 1), shrink=0.8)
    bar.set_label(f"denoising step in which the token was fixed (block size {block_size})")
    figure.savefig(path, dpi=120)
