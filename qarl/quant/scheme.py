"""Which layers are quantized in which format. The forward, publication, the engine's config and export follow it.

Imports no torch: the configuration is built on it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from qarl.errors import ConfigError

IntScheme = Literal["w8a8_int8", "w4a16", "w4a8"]
FloatScheme = Literal["fp8_tensor", "fp8_channel", "fp8_block", "mxfp4a16", "mxfp4", "nvfp4a16", "nvfp4"]
SchemeName = Literal[IntScheme, FloatScheme, "none"]
KernelKind = Literal["auto", "engine", "torch", "triton", "reference"]

Arithmetic = Literal["fp32", "bf16", "int8", "fp8", "fp4", "weight_only", "w4a8"]
"""What a GEMM computes in. `weight_only`: low-bit weights, expanded to bfloat16 within. `w4a8`: int4 by int8."""


@dataclass(frozen=True)
class Traits:
    """What the configuration needs to know of a format, without torch; `qarl.quant.formats` has the rest."""

    grouped: bool = False
    """Its scales belong to groups of `group_size` input features."""
    batch_invariant: bool = True
    """vLLM's batch-invariant mode reaches its GPU kernels. It does not reach Marlin, whose sums depend on the batch."""
    tensor_parallel: bool = False
    """The learner follows tensor-parallel engines in it: its scales of weights belong to whole channels."""


TRAITS: dict[SchemeName, Traits] = {
    "none": Traits(tensor_parallel=True),
    "w8a8_int8": Traits(tensor_parallel=True),
    "w4a16": Traits(grouped=True, batch_invariant=False),
    "w4a8": Traits(grouped=True),
    "fp8_tensor": Traits(),
    "fp8_channel": Traits(),
    "fp8_block": Traits(),
    "mxfp4a16": Traits(batch_invariant=False),
    "mxfp4": Traits(),
    "nvfp4a16": Traits(batch_invariant=False),
    "nvfp4": Traits(),
}
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "routed_experts": ("0.gate_proj", "0.up_proj", "0.down_proj"),
}
"""The engine's fused layers, and the model's linear layers that they hold: siblings are quantized alike. The engine
looks at its first expert to see whether experts are quantized."""
ROUTER = r"re:.*\.mlp\.gate$"
"""The router of a mixture of experts is never quantized: in the engine it is a linear layer like others."""


@dataclass(frozen=True)
class QuantScheme:
    """Which linear layers are quantized, and on which grid (`qarl.quant.formats.format_of`).

    `none` quantizes nothing. Embeddings, norms and routers are never quantized. `ignore` lists
    layers kept in high precision: full module names, their last parts, or `re:` patterns. `group_size` counts the
    input features that share a scale, in the int4 formats.
    """

    name: SchemeName = "w8a8_int8"
    ignore: tuple[str, ...] = ("lm_head",)
    group_size: int = 128

    @classmethod
    def of(cls, name: SchemeName, ignore: Sequence[str], group_size: int = 128) -> Self:
        """Scheme from config values. Raises ConfigError for a pattern that is no regular expression."""
        for pattern in ignore:
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                what = f"'{pattern}' is no regular expression: {error}"
                raise ConfigError(what, "rollout.ignore", "put a backslash before its special characters") from error
        return cls(name, tuple(ignore), group_size)

    @property
    def label(self) -> str:
        """Name and, where scales are grouped, group size: `w4a16-g128`. Ignored layers are not part of it."""
        return f"{self.name}-g{self.group_size}" if self.grouped else self.name

    @property
    def quantizes(self) -> bool:
        return self.name != "none"

    @property
    def grouped(self) -> bool:
        return TRAITS[self.name].grouped

    def covers(self, module: str) -> bool:
        """Whether the linear layer called `module` is quantized."""
        return self.quantizes and not any(_matches(pattern, module) for pattern in (*self.ignore, ROUTER))

    def unmatched(self, modules: Sequence[str]) -> list[str]:
        """Ignore patterns that match none of `modules`."""
        return [pattern for pattern in self.ignore if not any(_matches(pattern, module) for module in modules)]

    def siblings(self, module: str) -> tuple[str, ...]:
        """The layers that the engine fuses `module` with, itself included; only itself when it is not fused."""
        parent, _, name = module.rpartition(".")
        for parts in FUSED.values():
            if name in parts:
                return tuple(f"{parent}.{part}" if parent else part for part in parts)
        return (module,)

    def library_ignore(self) -> list[str]:
        """`ignore` as the library and the engine read it: they know full names and `re:` only."""
        return ["re:" + _regex(pattern) for pattern in (*self.ignore, ROUTER)]


def _regex(pattern: str) -> str:
    return pattern.removeprefix("re:") if pattern.startswith("re:") else rf"(.*\.)?{re.escape(pattern)}$"


def _matches(pattern: str, module: str) -> bool:
    return re.match(_regex(pattern), module) is not None
