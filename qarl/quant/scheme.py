"""How a model is quantized. The learner's forward, publication, the engine's config and export all derive from here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qarl.errors import ConfigError

SchemeName = Literal["w8a8_int8", "none"]


@dataclass(frozen=True)
class QuantScheme:
    """Which linear layers are quantized, and on which grid.

    `w8a8_int8`: int8 weight, symmetric, one float32 scale per output channel; int8 activation, symmetric, one dynamic
    scale per token. `none`: nothing is quantized. Embeddings and norms are no linear layers and stay as they are.
    `ignore` lists linear layers kept in high precision: full module names, their last parts, or `re:` patterns.
    """

    name: SchemeName = "w8a8_int8"
    ignore: tuple[str, ...] = ("lm_head",)

    @classmethod
    def of(cls, name: SchemeName, ignore: Sequence[str]) -> QuantScheme:
        """Scheme from config values. Raises ConfigError for a pattern that is no regular expression."""
        for pattern in ignore:
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise ConfigError(f"'{pattern}' is no regular expression: {error}", where="rollout.ignore") from error
        return cls(name, tuple(ignore))

    @property
    def quantizes(self) -> bool:
        return self.name != "none"

    def covers(self, module: str) -> bool:
        """Whether the linear layer called `module` is quantized."""
        return self.quantizes and not any(_matches(pattern, module) for pattern in self.ignore)

    def quantization_config(self) -> dict[str, Any] | None:
        """The `quantization_config` of a compressed-tensors checkpoint; None for an unquantized one.

        Source: compressed-tensors 0.17 `QuantizationConfig`.
        """
        if not self.quantizes:
            return None
        grid = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["re:" + _regex(pattern) for pattern in self.ignore],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**grid, "strategy": "channel", "dynamic": False, "observer": "minmax"},
                    "input_activations": {**grid, "strategy": "token", "dynamic": True},
                    "output_activations": None,
                }
            },
        }

    @property
    def engine_kernels(self) -> tuple[str, ...]:
        """Kernels of vLLM that implement this scheme, by class name; any other choice of the engine is an error."""
        if not self.quantizes:
            return ()
        return ("CPUInt8ScaledMMLinearKernel", "CutlassInt8ScaledMMLinearKernel", "TritonInt8ScaledMMLinearKernel")


def _regex(pattern: str) -> str:
    # The library and the engine know full names and `re:` only: a last part reaches them as a regular expression.
    return pattern.removeprefix("re:") if pattern.startswith("re:") else rf"(.*\.)?{re.escape(pattern)}$"


def _matches(pattern: str, module: str) -> bool:
    return re.match(_regex(pattern), module) is not None
