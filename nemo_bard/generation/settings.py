"""Settings of decoding: ``BardGenerationConfig``."""

from __future__ import annotations

import difflib
import logging
from typing import Any, ClassVar

from transformers import GenerationConfig

logger = logging.getLogger(__name__)


def as_id_list(value: int | list[int] | None) -> list[int]:
    """Return a token id, a list of them or None as a list."""
    if value is None:
        return []
    return [int(value)] if isinstance(value, int) else [int(v) for v in value]


def check_mask_token_id(mask_token_id: int | None, vocab_size: int) -> None:
    """Raise ValueError unless ``mask_token_id`` is None or a row of the embedding."""
    if mask_token_id is not None and not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"mask_token_id must be a row of the embedding, 0 to {vocab_size - 1}, got {mask_token_id}")


def unknown_key_error(kind: str, name: str, known: list[str]) -> ValueError:
    """Return the error for a name that is not known, with the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(sorted(known))}")


CLASS_MARKER = "generation_config_class"
REMASKING_STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "entropy_bound")
DECODE_PATHS = ("fast", "plain")
CACHE_IMPLEMENTATIONS = ("dynamic", "static")


class BardGenerationConfig(GenerationConfig):
    """How ``BardVLForConditionalGeneration.generate`` decodes; saved with the model as ``generation_config.json``.

    Args:
        max_new_tokens: Most response tokens returned, >= 1; exact, not rounded up to whole blocks.
        block_size: Tokens denoised together; None takes the model config's.
        denoising_steps: Most denoising forwards per block, >= 1; None or more than the block size means the block size.
        remasking_strategy: How a step picks the tokens to fix: ``low_confidence_static`` (the most confident ones, the
            block split evenly over the steps), ``low_confidence_dynamic`` (all above ``confidence_threshold``, at least
            the static number), ``entropy_bound`` (as many as keep their joint entropy under ``entropy_bound``).
        confidence_threshold: In (0, 1]; the test is strict (``>``).
        entropy_bound: Bound in nats on the joint mutual information of tokens fixed together, >= 0 (arXiv 2505.24857).
        edit_threshold: In (0, 1]; a visible token of the current block is replaced when the model prefers another one
            with a probability above it. None turns revision off.
        max_post_edit_steps: Further revision steps allowed after the last mask of a block is gone, >= 0; they end when
            nothing changes. Needs ``edit_threshold``.
        temperature: 0 is argmax; otherwise tokens are drawn from the softmax of logits / temperature.
        top_k: Keep the ``top_k`` most likely tokens before drawing; 0 keeps all.
        top_p: Keep the smallest set of tokens with at least this total probability, in (0, 1].
        suppress_mask_token: Never emit the mask id.
        mask_token_id: Id of ``[MASK]``; None takes the model config's.
        eos_token_id: Id that ends a response, or a list; None takes the model config's.
        pad_token_id: Id after the end; None takes the first EOS id.
        decode_path: ``fast``, or ``plain``: the oracle, with separate commit forwards and logits everywhere.
        cache_implementation: ``dynamic`` (exact shapes), ``static`` (fixed shapes, compiled on CUDA); None picks
            ``static`` on CUDA and ``dynamic`` elsewhere.
        compile_step: Compile the block forward (``static`` cache only); None compiles on CUDA.
        return_dict_in_generate: Return a ``BardGenerateOutput`` instead of ids.
        return_step_stats: Return ``(ids, stats)``.
        output_history: Keep ids and confidence of every step in the output.

    Raises:
        ValueError: For an unknown key or a value that is not allowed; names it and what is.
    """

    _DEFAULTS: ClassVar[dict[str, Any]] = {
        "max_new_tokens": 1024,
        "block_size": None,
        "denoising_steps": None,
        "remasking_strategy": "low_confidence_dynamic",
        "confidence_threshold": 0.5,
        "entropy_bound": 0.1,
        "edit_threshold": None,
        "max_post_edit_steps": 0,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "suppress_mask_token": True,
        "mask_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "bos_token_id": None,
        "decode_path": "fast",
        "cache_implementation": None,
        "compile_step": None,
        "return_dict_in_generate": False,
        "return_step_stats": False,
        "output_history": False,
    }
    _METADATA: ClassVar[tuple[str, ...]] = ("transformers_version", "_from_model_config", "_commit_hash", CLASS_MARKER)
    _TOKEN_IDS: ClassVar[tuple[str, ...]] = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")

    def __init__(self, **kwargs: Any) -> None:
        # transformers' __init__ sets some sixty autoregressive attributes that mean nothing here; it is left out on
        # purpose, as transformers' own block-diffusion configuration does.
        for name, default in self._DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        for name in self._METADATA[:3]:
            setattr(self, name, kwargs.pop(name, None))
        kwargs.pop(CLASS_MARKER, None)
        for name in kwargs:
            raise unknown_key_error("generation setting", name, list(self._DEFAULTS))
        self.validate()

    @classmethod
    def known_keys(cls) -> list[str]:
        """Names of all settings."""
        return list(cls._DEFAULTS)

    def validate(self, strict: bool = False, **_: Any) -> None:
        """Raise ValueError for a value that is not allowed."""
        del strict
        self._check_integer("max_new_tokens", 1)
        self._check_integer("block_size", 1, optional=True)
        self._check_integer("denoising_steps", 1, optional=True)
        self._check_integer("max_post_edit_steps", 0)
        self._check_integer("top_k", 0)
        self._check_fraction("confidence_threshold")
        self._check_fraction("edit_threshold", optional=True)
        self._check_fraction("top_p")
        self._check_choice("remasking_strategy", REMASKING_STRATEGIES)
        self._check_choice("decode_path", DECODE_PATHS)
        self._check_choice("cache_implementation", CACHE_IMPLEMENTATIONS, optional=True)
        for name in ("suppress_mask_token", "return_dict_in_generate", "return_step_stats", "output_history"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("temperature", "entropy_bound"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        self._check_token_ids()
        if self.compile_step not in (None, True, False):
            raise ValueError(f"compile_step must be true, false or null, got {self.compile_step!r}")
        if self.compile_step and self.cache_implementation != "static":
            raise ValueError('compile_step=True needs cache_implementation="static"')
        if self.max_post_edit_steps and self.edit_threshold is None:
            raise ValueError(f"max_post_edit_steps={self.max_post_edit_steps} needs edit_threshold in (0, 1]")

    def _check_integer(self, name: str, low: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")

    def _check_fraction(self, name: str, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value!r}")

    def _check_choice(self, name: str, allowed: tuple[str, ...], *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")

    def _check_token_ids(self) -> None:
        for name in self._TOKEN_IDS:
            value = getattr(self, name)
            ids = value if isinstance(value, (list, tuple)) and name == "eos_token_id" else [value]
            if any(v is not None and (isinstance(v, bool) or not isinstance(v, int) or v < 0) for v in ids):
                raise ValueError(f"{name} must be a token id >= 0, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """All settings, with a marker that says whose they are."""
        return {**super().to_dict(), CLASS_MARKER: type(self).__name__}

    def to_diff_dict(self) -> dict[str, Any]:
        """Settings that differ from the defaults, and metadata."""
        mine = self.to_dict()
        return {
            name: value
            for name, value in mine.items()
            if name in ("transformers_version", CLASS_MARKER)
            or (name in self._DEFAULTS and value != self._DEFAULTS[name])
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> BardGenerationConfig:
        """Build from a dictionary, as read from ``generation_config.json``.

        A file that this class did not write (Qwen3-VL's, or a released Bard-VL's) holds autoregressive settings; of
        those only the token ids are taken, and what is left out is logged.
        """
        values = dict(config_dict)
        if values.get(CLASS_MARKER) is None:
            foreign = [k for k in values if k not in cls._TOKEN_IDS and k not in cls._METADATA]
            if foreign:
                logger.info("generation_config.json was not written by nemo_bard; not used: %s", ", ".join(foreign))
            values = {k: v for k, v in values.items() if k not in foreign}
        unused = kwargs.pop("return_unused_kwargs", False)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("_from_auto", "_from_pipeline")}
        config = cls(**{**values, **kwargs})
        return (config, {}) if unused else config

    @classmethod
    def from_model_config(cls, model_config: Any) -> BardGenerationConfig:
        """Defaults; what a call needs from the model's configuration is read there."""
        del model_config
        return cls()

    @classmethod
    def from_generation_config(cls, config: GenerationConfig | None) -> BardGenerationConfig:
        """Return ``config`` itself if it is one, the defaults for None; else read it as ``from_dict`` reads a file."""
        if isinstance(config, cls):
            return config
        values = {} if config is None else config.to_dict()
        known = (*cls._DEFAULTS, *cls._METADATA)
        return cls.from_dict({name: values[name] for name in known if values.get(name) is not None})

    def updated(self, **overrides: Any) -> BardGenerationConfig:
        """Return a copy with ``overrides``; an unknown name raises ValueError."""
        values = {name: getattr(self, name) for name in self._DEFAULTS}
        return type(self)(**{**values, **overrides})
