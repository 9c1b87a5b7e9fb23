"""What qarl adds to vLLM's worker: load published weights in place, and read back what the model computes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qarl.errors import QarlError
from qarl.quant.formats import format_of
from qarl.quant.scheme import QuantScheme
from qarl.weights.source import Bucket, WeightSource
from qarl.weights.wire import unpack
from rollout.read_back import Selection, read_back

LOAD_ERRORS = (QarlError, OSError, KeyError, ValueError, RuntimeError, AssertionError, AttributeError)
"""What a weight source, vLLM's loaders and its kernels raise for wrong weights."""


class WeightLoader:
    """A vLLM worker extension: vLLM mixes it into its worker class, and `LLM.collective_rpc` calls its methods.

    A tensor-parallel engine has a worker in each of its processes. Every one gets all tensors, and vLLM's loaders keep
    its part of them.
    """

    def qarl_take(self, weights: WeightSource, scheme: QuantScheme, selection: Selection | None) -> list[Exception]:
        """Load `weights` in place, and compare the selected layers with what the engine then computes.

        Returns the error in a list, which is empty for none. Were it raised in another process, vLLM would keep its
        text alone, and take the answers of the processes after that one for answers to the next call.
        """
        try:
            self.qarl_load(unpack(weights), scheme)
            with torch.inference_mode():
                read_back(self.get_model(), weights, scheme, selection)  # type: ignore[attr-defined]
        except LOAD_ERRORS as error:
            return [error]
        return []

    def qarl_load(self, tensors: Iterator[tuple[str, Tensor]], scheme: QuantScheme) -> None:
        """Load a checkpoint's tensors in place, layer by layer. After an error, old and new ones are mixed."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        done = False
        try:
            self.reload_weights(weights_iterator=engine_names(tensors, scheme))  # type: ignore[attr-defined]
            done = True
        finally:
            if not done:  # else vLLM would add the tensors of the next reload to those of this one
                finalize_layerwise_reload(self.get_model(), self.model_config)  # type: ignore[attr-defined]

    def qarl_received(self) -> Bucket:
        """The tensors that a transfer has brought since the last call."""
        received: Bucket = self.weight_transfer_engine.inbox.take()  # type: ignore[attr-defined]
        return received

    def qarl_kernels(self) -> dict[str, str]:
        """The low-bit kernel's class name of every linear layer and expert stack, by layer; empty where it has none."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
        from vllm.model_executor.layers.linear import LinearBase

        kernels: dict[str, Any] = {}
        for name, layer in self.get_model().named_modules():  # type: ignore[attr-defined]
            if isinstance(layer, LinearBase):
                scheme = getattr(layer, "scheme", None)
                kernels[name] = getattr(scheme, "kernel", getattr(scheme, "fp8_linear", None))
            elif isinstance(layer, RoutedExperts):
                plain = isinstance(layer.quant_method, UnquantizedFusedMoEMethod)
                kernels[name] = None if plain else layer.quant_method.moe_kernel.fused_experts
        return {name: "" if kernel is None else type(kernel).__name__ for name, kernel in kernels.items()}


def engine_names(tensors: Iterator[tuple[str, Tensor]], scheme: QuantScheme) -> Iterator[tuple[str, Tensor]]:
    """`tensors` with the names that the engine's reload expects: some weights need two (`Format.reload_alias`)."""
    alias = format_of(scheme).reload_alias if scheme.quantizes else ""
    for name, tensor in tensors:
        yield name, tensor
        if alias and tensor.dtype == torch.int8:
            yield f"{name}{alias}", tensor
