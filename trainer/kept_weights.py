"""Copies of the learner's weights as they were published, to score what earlier versions sampled."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qarl.quant.linear import requantize


class KeptWeights:
    """Copies of the parameters of `model`, in the host's memory, by version. Not for sharded ones (ZeRO stage 3)."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._kept = model, dict[int, list[Tensor]]()

    def keep(self, version: int, oldest: int) -> None:
        """Keep the weights of now as `version`, and forget the versions before `oldest`."""
        self._kept = {v: weights for v, weights in self._kept.items() if v >= oldest} | {version: self._copy()}

    @contextmanager
    def of(self, version: int) -> Iterator[None]:
        """The model computes with the weights of `version` here, and then with those of now again. Raises KeyError when
        it is not kept."""
        kept, now = self._kept[version], self._copy()
        try:
            self._put(kept)
            yield
        finally:
            self._put(now)

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().to("cpu", copy=True) for parameter in self._model.parameters()]

    @torch.no_grad()
    def _put(self, weights: list[Tensor]) -> None:
        for parameter, tensor in zip(self._model.parameters(), weights, strict=True):
            parameter.copy_(tensor)
        requantize(self._model)
