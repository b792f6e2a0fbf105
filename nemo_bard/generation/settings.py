"""Settings of decoding: ``BardGenerationConfig``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, cast

from transformers import GenerationConfig

from nemo_bard.base.errors import unknown_name
from nemo_bard.generation.parameters import GenerationSettings, build_settings, setting_fields
from nemo_bard.generation.strategies import Strategy

logger = logging.getLogger(__name__)


def as_id_list(value: int | Sequence[int] | None) -> list[int]:
    """Return a token id, several of them or None as a list."""
    if value is None:
        return []
    return [int(value)] if isinstance(value, int) else [int(v) for v in value]


def check_mask_token_id(mask_token_id: int | None, vocab_size: int) -> None:
    """Raise ValueError unless ``mask_token_id`` is None or a row of the embedding."""
    if mask_token_id is not None and not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"mask_token_id must be a row of the embedding, 0 to {vocab_size - 1}, got {mask_token_id}")


CLASS_MARKER = "generation_config_class"


class BardGenerationConfig(GenerationConfig):
    """How ``BardVLForConditionalGeneration.generate`` decodes; saved with the model as ``generation_config.json``.

    Its settings are the fields of ``nemo_bard.generation.parameters.GenerationSettings`` and the parameters of all
    registered remasking strategies; ``nemo_bard.generation.parameters.settings_reference`` lists them.

    Raises:
        ValueError: For an unknown key or a value that is not allowed; names it and what is.
    """

    _METADATA: ClassVar[tuple[str, ...]] = ("transformers_version", "_from_model_config", "_commit_hash", CLASS_MARKER)
    _TOKEN_IDS: ClassVar[tuple[str, ...]] = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    block_size: int | None
    remasking_strategy: str
    adapter: str | None
    return_step_stats: bool

    def __init__(self, **kwargs: Any) -> None:
        # transformers' __init__ sets some sixty autoregressive attributes that mean nothing here; it is left out on
        # purpose, as transformers' own block-diffusion configuration does.
        fields = setting_fields(kwargs.get("remasking_strategy"))
        for name, field in fields.items():
            setattr(self, name, kwargs.pop(name, field.default))
        for name in self._METADATA[:3]:
            setattr(self, name, kwargs.pop(name, None))
        kwargs.pop(CLASS_MARKER, None)
        for name in kwargs:
            raise unknown_name("generation setting", name, fields)
        self.validate()

    @classmethod
    def known_keys(cls, strategy: str | None = None) -> list[str]:
        """Names of all settings; those of a strategy with a dotted name if it is given."""
        return list(setting_fields(strategy))

    def resolve(self) -> tuple[GenerationSettings, Strategy]:
        """The settings as they are now: the general ones, and the strategy with its parameters.

        Raises:
            ValueError: For a value that is not allowed.
        """
        return build_settings(vars(self))

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Raise ValueError for a value that is not allowed."""
        del strict, user_set_attributes
        self.resolve()

    def to_dict(self) -> dict[str, Any]:
        """All settings, with a marker that says whose they are."""
        return {**super().to_dict(), CLASS_MARKER: type(self).__name__}

    def to_diff_dict(self) -> dict[str, Any]:
        """Settings that differ from the defaults, and metadata."""
        fields = setting_fields(self.remasking_strategy)
        return {
            name: value
            for name, value in self.to_dict().items()
            if name in ("transformers_version", CLASS_MARKER) or (name in fields and value != fields[name].default)
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> BardGenerationConfig:
        """Build from a dictionary, as read from ``generation_config.json``.

        A file that this class did not write (Qwen3-VL's, or a released Bard-VL's) holds autoregressive settings; of
        those only the token ids are taken, and what is left out is logged. With ``return_unused_kwargs=True`` a pair with
        an empty dictionary is returned, which the declared type leaves out, as transformers' does.
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
        return cast("BardGenerationConfig", (config, {})) if unused else config

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
        known = (*setting_fields(values.get("remasking_strategy")), *cls._METADATA)
        return cls.from_dict({name: values[name] for name in known if values.get(name) is not None})

    def updated(self, **overrides: Any) -> BardGenerationConfig:
        """Return a copy with ``overrides``; an unknown name raises ValueError.

        Parameters of a strategy with a dotted name stay behind when another strategy takes its place.
        """
        known = setting_fields(overrides.get("remasking_strategy", self.remasking_strategy))
        values = {name: value for name, value in vars(self).items() if name in known}
        return type(self)(**{**values, **overrides})
