"""Questions in, answers out: loading a checkpoint, building prompts, and decoding a batch with either kind of model."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from nemo_bard.base.memory import without_read_pages
from nemo_bard.checkpoints.folder import check_checkpoint, read_header
from nemo_bard.data.encode import encode_prompts
from nemo_bard.generation.settings import BardGenerationConfig, as_id_list

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The response to one prompt."""

    text: str
    num_tokens: int
    """Response tokens, the end token included."""
    denoising_forwards: int
    """Forwards of this row that predicted tokens; one per token for an autoregressive model."""
    commit_forwards: int
    """Further forwards of this row that only wrote a finished block into the cache."""

    @property
    def tpf(self) -> float:
        """Tokens per denoising forward, commits not counted."""
        return self.num_tokens / self.denoising_forwards

    @property
    def tpf_with_commits(self) -> float:
        """Tokens per forward, commits counted."""
        return self.num_tokens / (self.denoising_forwards + self.commit_forwards)


@dataclass(frozen=True, kw_only=True)
class AnswerBatch:
    """Answers to prompts that were decoded together."""

    answers: list[Answer]
    forwards: int
    """Forwards of the language model for the whole batch, the prompt's included."""
    seconds: float
    """Wall-clock seconds of ``generate``: vision, prompt and decoding, without the processor."""


class Responder(Protocol):
    """Answers conversations that end with a user turn."""

    def answer(self, conversations: Sequence[list[dict[str, Any]]]) -> AnswerBatch:
        """Decode one batch."""
        ...


class BlockDiffusionResponder:
    """Answers with a BARD model.

    Args:
        model: ``BardVLForConditionalGeneration``.
        processor: Its processor.
        generation_config: Settings; the model's own if None.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        generation_config: BardGenerationConfig | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        base = generation_config if generation_config is not None else model.generation_config
        self.config = base.updated(return_dict_in_generate=True, return_step_stats=False)

    def answer(self, conversations: Sequence[list[dict[str, Any]]]) -> AnswerBatch:
        """Decode one batch."""
        batch = encode_prompts(self.processor, conversations).to(self.model.device)
        output, seconds = _timed(self.model, lambda: self.model.generate(batch, generation_config=self.config))
        return AnswerBatch(answers=answers_of(output, self.processor), forwards=output.forwards, seconds=seconds)


def answers_of(output: Any, processor: Any) -> list[Answer]:
    """Turn a ``BardGenerateOutput`` into one ``Answer`` per row."""
    lengths = output.lengths.tolist()
    texts = [
        processor.tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(output.sequences.cpu(), lengths, strict=True)
    ]
    steps, commits = output.block_step_counts.sum(1).tolist(), output.commit_forwards.tolist()
    return [
        Answer(text=text, num_tokens=length, denoising_forwards=step, commit_forwards=commit)
        for text, length, step, commit in zip(texts, lengths, steps, commits, strict=True)
    ]


class AutoregressiveResponder:
    """Answers token by token, greedily, with transformers' ``generate``: the source model that BARD is compared with.

    Args:
        model: transformers' ``Qwen3VLForConditionalGeneration``.
        processor: Its processor.
        max_new_tokens: Most response tokens.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        found = as_id_list(model.generation_config.eos_token_id)
        self.end_ids = set(found or as_id_list(model.config.text_config.eos_token_id))
        if not self.end_ids:
            raise ValueError("eos_token_id is set neither in generation_config.json nor in config.json")
        pad = model.generation_config.pad_token_id
        self.pad_token_id = pad if pad is not None else next(iter(self.end_ids))

    def answer(self, conversations: Sequence[list[dict[str, Any]]]) -> AnswerBatch:
        """Decode one batch."""
        batch = encode_prompts(self.processor, conversations).to(self.model.device)
        with torch.no_grad():
            sequences, seconds = _timed(
                self.model,
                lambda: self.model.generate(
                    **batch,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_k=None,
                    top_p=None,
                    eos_token_id=sorted(self.end_ids),
                    pad_token_id=self.pad_token_id,
                ),
            )
        responses = sequences[:, batch["input_ids"].shape[1] :].tolist()
        answers = []
        for row in responses:
            length = next((i + 1 for i, token in enumerate(row) if token in self.end_ids), len(row))
            text = self.processor.tokenizer.decode(row[:length], skip_special_tokens=True)
            answers.append(Answer(text=text, num_tokens=length, denoising_forwards=length, commit_forwards=0))
        return AnswerBatch(answers=answers, forwards=len(responses[0]), seconds=seconds)


def _timed(model: Any, call: Any) -> tuple[Any, float]:
    on_cuda = model.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    result = call()
    if on_cuda:
        torch.cuda.synchronize(model.device)
    return result, time.perf_counter() - start


def is_block_diffusion(model: Any) -> bool:
    """Whether a model decodes block by block (``model_type`` is ``bard_vl``)."""
    return model.config.model_type == "bard_vl"


def make_responder(
    model: Any,
    processor: Any,
    generation_config: BardGenerationConfig | None = None,
) -> Responder:
    """Return the responder that fits a model.

    Args:
        model: A BARD model, or transformers' Qwen3-VL.
        processor: Its processor.
        generation_config: Settings of block diffusion; of an autoregressive model only ``max_new_tokens`` is used, and
            it has to be given.

    Raises:
        ValueError: For an autoregressive model without ``generation_config``.
    """
    if is_block_diffusion(model):
        return BlockDiffusionResponder(model, processor, generation_config)
    if generation_config is None:
        raise ValueError("generation_config is needed for an autoregressive model; it gives max_new_tokens")
    return AutoregressiveResponder(model, processor, generation_config.max_new_tokens)


def check_device(name: str | None) -> torch.device:
    """Return the device to run on: ``name``, or CUDA where there is one.

    Raises:
        ValueError: If it is unknown or not on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is not on this machine, it has {torch.cuda.device_count()} CUDA devices")
    return device


def _files_to_cast(folder: Path, dtype: str) -> list[Path]:
    """The weight files of a folder if all weights in them have another dtype; else none."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = [one for file in files for name, one in read_header(file).items() if name != "__metadata__"]
    same = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    return [] if any(one["dtype"] == same for one in tensors) else files


def load_checkpoint(path: str | Path, *, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """Load model and processor of a folder.

    Args:
        path: A BARD folder, or a Qwen3-VL folder, which is loaded as transformers' autoregressive model.
        device: Where to put it; CUDA where there is one if None.
        dtype: One of ``nemo_bard.checkpoints.folder.DTYPES``; ``auto`` is bfloat16 on CUDA and float32 elsewhere.

    Returns:
        The model in eval mode, and the processor.

    Raises:
        ValueError: For a wrong or incomplete folder, device or dtype.
    """
    model_type = check_checkpoint(path, dtype)
    target = check_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if target.type == "cuda" else "float32"
    from transformers import AutoProcessor

    if model_type == "bard_vl":
        from nemo_bard.model.modeling import BardVLForConditionalGeneration as ModelClass
    else:
        from transformers import Qwen3VLForConditionalGeneration as ModelClass
    try:
        processor = AutoProcessor.from_pretrained(path)
        with without_read_pages(_files_to_cast(Path(path), dtype)):
            model = cast("torch.nn.Module", ModelClass.from_pretrained(path, dtype=getattr(torch, dtype)))
    except OSError as error:  # transformers' way to say that files are missing
        raise ValueError(f"model folder {path} is not complete: {' '.join(str(error).split())}") from error
    return model.to(target).eval(), processor
