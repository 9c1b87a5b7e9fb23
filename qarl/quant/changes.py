"""How far an update moves the quantized weights, of which the sampler sees codes and scales only.

Suffixes: N output features, K input features; S rows of a sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from qarl.metrics import Metrics, mean
from qarl.quant.experts import QuantizedExperts, expert_weights
from qarl.quant.format import Format, Quantized
from qarl.quant.linear import Gather, QuantizedLinear, gather_nothing

SAMPLED = 2**14
"""Weights of a layer, or a few more, that are compared with the grid."""


@dataclass(frozen=True)
class _Before:
    """A layer before the update. The codes are no copy."""

    codes: Tensor
    weight_SK: Tensor


class CodeChanges:
    """Compares the quantized layers of a model before and after an update. Made before it, and read once after it.

    Ranks share the work: each compares every `ranks`-th layer, and merging their metrics gives those of all layers.

    Args:
        gather: makes sharded parameters whole within its context (ZeRO-3).
        rank, ranks: of this process.
    """

    def __init__(self, model: nn.Module, gather: Gather = gather_nothing, rank: int = 0, ranks: int = 1) -> None:
        self._model, self._gather, self._rank, self._ranks = model, gather, rank, ranks
        self._before = [
            _Before(format_.codes(quantized), weight_NK[:: _stride(weight_NK)].clone())
            for format_, weight_NK, quantized in self._layers()
        ]

    def metrics(self) -> Metrics:
        """Two shares, of this rank's layers; none without quantized layers:

        - `quant/codes_changed`: codes (the low-bit integers or floats, without their scales) that differ.
        - `quant/update_below_grid`: weights w, as the model's dtype holds them, for which |w_after - w_before| < d / 2,
          where d is the distance to the next value on the grid of after the update. Such an update does not move a
          weight that lay on the grid: it only counts together with others, in the master. Taken of about `SAMPLED`
          weights of each layer, in rows at equal distances.

        A changed scale reaches the sampler, too, and counts in neither.
        """
        changed = codes = below = weights = 0
        for before, (format_, weight_NK, quantized) in zip(self._before, self._layers(), strict=True):
            changed += format_.differing(before.codes, format_.codes(quantized))
            codes += weight_NK.numel()
            stride = _stride(weight_NK)
            update_SK = (weight_NK[::stride].float() - before.weight_SK.float()).abs()
            below += int((update_SK < format_.steps(quantized, len(weight_NK), stride) / 2).sum())
            weights += update_SK.numel()
        return {"quant/codes_changed": mean(changed, codes), "quant/update_below_grid": mean(below, weights)}

    def _layers(self) -> Iterator[tuple[Format, Tensor, Quantized]]:
        """(format, weight [N, K], its quantized tensors) of this rank's layers."""
        layers = [m for m in self._model.modules() if isinstance(m, QuantizedLinear | QuantizedExperts)]
        for number, layer in enumerate(layers):
            with self._gather(list(layer.parameters(recurse=False))):  # collective
                if number % self._ranks != self._rank:
                    continue
                if isinstance(layer, QuantizedLinear):
                    yield layer.format_, layer.weight.detach(), layer.quantized()
                else:
                    for part, weight_NK in expert_weights(layer):
                        yield layer.format_, weight_NK, layer.parts()[part]


def _stride(weight_NK: Tensor) -> int:
    return max(1, weight_NK.numel() // SAMPLED)
