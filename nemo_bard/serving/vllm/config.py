"""The model's configuration as vLLM sees it, and the decode settings that a request starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from nemo_bard.generation.adapter_folders import adapter_names
from nemo_bard.generation.parameters import NO_END, STRATEGIES, denoising_strategies, setting_fields
from nemo_bard.generation.settings import BardGenerationConfig, as_id_list
from nemo_bard.model.configuration import BardVLConfig
from nemo_bard.upstream.vllm import installed_version, unsupported


class ServedBardVLConfig(BardVLConfig):
    """``BardVLConfig`` with what makes it a diffusion model for vLLM."""

    served_defaults: dict[str, Any] | None = None
    """Decode settings that a request starts from, by name; filled in by ``fill_defaults``."""

    @property
    def canvas_length(self) -> int | None:
        """Tokens that are denoised together."""
        return self.block_size


class RefusedConfig(BardVLConfig):
    """Stands for the configuration where vLLM is not one that the plugin is written for: nothing can be made of it."""

    def __post_init__(self, **kwargs: Any) -> None:
        del kwargs
        raise ValueError(unsupported(installed_version() or "unknown"))


def is_bard(model_config: Any) -> bool:
    """Whether a model configuration of vLLM is that of a BARD model."""
    return isinstance(model_config.hf_config, ServedBardVLConfig)


_MERGE = "make a whole checkpoint with `nemo-bard merge DIR/adapters/NAME WHOLE`"


def read_defaults(model_config: Any) -> dict[str, Any]:
    """The decode settings of a server, by name: defaults, ``generation_config.json``, ``--override-generation-config``.

    Args:
        model_config: vLLM's.

    Raises:
        ValueError: For a setting that is unknown or not allowed.
    """
    source = model_config.generation_config
    config = BardGenerationConfig()
    if source != "vllm":
        where = model_config.model if source == "auto" else source
        revision = (model_config.revision if source == "auto" else None) or "main"
        try:
            config = cast("BardGenerationConfig", BardGenerationConfig.from_pretrained(where, revision=revision))
        except OSError:  # there is no such file
            config = BardGenerationConfig()
    override = model_config.override_generation_config
    config = config.updated(**{name: value for name, value in override.items() if name not in VLLM_DEFAULTS})
    if config.adapter is not None:
        raise ValueError(f"adapter={config.adapter!r} is not for vLLM; {_MERGE}")
    if STRATEGIES.get(config.remasking_strategy).by_next_token:
        if adapter_names(Path(model_config.model)):
            raise ValueError(
                f"{model_config.model} decodes by block diffusion with its adapters alone, which vLLM does not take; {_MERGE}"
            )
        raise ValueError(
            f"remasking_strategy must be one of {', '.join(denoising_strategies())} with vLLM, got"
            f" {config.remasking_strategy!r}; pass --override-generation-config"
        )
    return {name: getattr(config, name) for name in setting_fields(config.remasking_strategy)}


VLLM_DEFAULTS = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
}
"""Defaults of vLLM's that files of autoregressive models hold, and BARD does not have."""
SHARED = ("temperature", "top_k", "top_p")
"""Settings that requests give as vLLM's sampling parameters."""


def fill_defaults(model_config: Any) -> None:
    """Read the server's decode settings, and make vLLM start requests from them."""
    hf_config = model_config.hf_config
    hf_config.served_defaults = defaults = read_defaults(model_config)
    override = model_config.override_generation_config
    model_config.override_generation_config = {
        **VLLM_DEFAULTS,
        **{name: defaults[name] for name in SHARED},
        **override,
    }


def end_ids(hf_config: ServedBardVLConfig, defaults: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids that end a response (none: empty), and ids that end earlier turns of a prompt."""
    given = defaults.get("eos_token_id")
    if given is None:
        return hf_config.end_ids, hf_config.end_ids
    if given == NO_END:
        return [], hf_config.end_ids
    return as_id_list(given), as_id_list(given)
