"""The engine's own CPU ops, called from the learner. The only file of qarl that imports vLLM, and only when used.

Suffixes: N tokens of a flat batch, C tokens of its cache, H query heads, G key/value heads, D head width; X experts, K
of them for a token, E model width, I inner width, F = 2I.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qarl.errors import KernelError
from qarl.numerics.flat import Row
from qarl.numerics.processor import threads
from qarl.numerics.vllm_patch import patch_cpu

BLOCK_SIZE = 128  # tokens of a KV-cache block; the engine uses the same
DECODE_CHUNK = 64  # one-token requests of one call
TILE_MULTIPLE = 32  # keys of attention's tiles
EXPERT_CHUNK = 2048  # tokens of one call; the op counts its scratch memory in int32


def available() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


@cache
def ops() -> Any:
    """vLLM's CPU ops. Raises KernelError where vLLM is missing or was not checked."""
    if not available():
        what = "the engine's ops need vLLM, which is not installed"
        raise KernelError(what, hint="install it, or set learner.numerics=portable")
    patch_cpu()
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return _custom_ops


class PagedLayout:
    """How the tokens of a flat batch lie in the engine's paged cache, and in which requests it computed them.

    The engine prefills a prompt in one request and then decodes token by token. Beyond about 480 tokens prefill and
    decode tile differently, so each response token is a one-token request here too. How a prefill is tiled depends on
    the number of threads, too, and so it runs on one, like the engine. Every response has cache blocks of its own,
    which hold a copy of the keys and values of its prompt: a prompt ends within a block.

    Args:
        rows: per response, where its tokens lie in the flat batch.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        lengths = [row.prompt_len + row.response_len for row in rows]
        blocks = [-(-length // BLOCK_SIZE) for length in lengths]
        self.num_blocks = sum(blocks)
        table = torch.zeros(len(rows), max(blocks), dtype=torch.int32)
        slots: list[Tensor] = []
        prefill: list[Request] = []
        decode: list[Request] = []
        block = 0
        for number, row in enumerate(rows):
            table[number, : blocks[number]] = torch.arange(block, block + blocks[number], dtype=torch.int32)
            slots.append(block * BLOCK_SIZE + torch.arange(lengths[number]))
            if row.owns_prompt:
                prefill.append((number, row.prompt_start, row.prompt_len, row.prompt_len))
            decode += [(number, row.response_start + i, 1, row.prompt_len + i + 1) for i in range(row.response_len)]
            block += blocks[number]
        self._slots_C = torch.cat(slots)
        self._cached_C = torch.cat([row.tokens() for row in rows])
        chunks = [prefill] + [decode[i : i + DECODE_CHUNK] for i in range(0, len(decode), DECODE_CHUNK)]
        self._calls = [_Call(requests, table) for requests in chunks]

    def attend(self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, scale: float) -> Tensor:
        """Causal attention as the engine computes it: [N, H, D] in the dtype of q, which is rounded once."""
        heads, dim = q_NHD.shape[1:]
        kv_heads = k_NGD.shape[1]
        isa = "vec" if dim % 32 == 0 else "vec16"
        cache = torch.zeros(self.num_blocks, kv_heads, BLOCK_SIZE * 2, dim, dtype=q_NHD.dtype)
        k_cache, v_cache = cache.chunk(2, dim=2)
        k_CGD, v_CGD = k_NGD[self._cached_C], v_NGD[self._cached_C]
        ops().cpu_attn_reshape_and_cache(k_CGD, v_CGD, k_cache, v_cache, self._slots_C, isa)
        q_NHD = q_NHD.contiguous()
        out_NHD = torch.empty_like(q_NHD)
        for call in self._calls:
            q = q_NHD[call.tokens]
            out = torch.empty_like(q)
            with threads(torch.get_num_threads() if call.decodes else 1):
                ops().cpu_attention_with_kv_cache(
                    query=q,
                    key_cache=k_cache,
                    value_cache=v_cache,
                    output=out,
                    query_start_loc=call.starts,
                    seq_lens=call.seq_lens,
                    scale=scale,
                    causal=True,
                    alibi_slopes=None,
                    sliding_window=-1,
                    block_table=call.block_table,
                    softcap=0,
                    scheduler_metadata=call.schedule(heads, kv_heads, dim, q.dtype, isa),
                    s_aux=None,
                )
            out_NHD[call.tokens] = out
        return out_NHD


def same_prefill_tokens(head_dim: int, longest: int) -> int:
    """Tokens of the longest context, up to `longest`, that the engine's attention computes alike in every prefill here.

    It goes over the keys in tiles: the larger the L2 cache and the fewer the queries of a call, the longer. Beyond one
    tile, a prompt whose beginning is in the prefix cache gets other bits than one that is prefilled as a whole.
    Measured: one prefill beside a decoding of all tokens, in float32, whose tiles are shorter than those of bfloat16.
    """
    total = longest + 2048  # queries enough for the shortest tiles
    generator = torch.Generator().manual_seed(0)
    q_NHD, k_NGD, v_NGD = torch.randn(3, total, 1, head_dim, generator=generator)
    prefilled, decoded = (
        PagedLayout([Row(0, prompt, prompt, total - prompt, True)]).attend(q_NHD, k_NGD, v_NGD, head_dim**-0.5)
        for prompt in (total, 1)
    )
    differs_N = (prefilled != decoded).flatten(1).any(1)[:longest]
    return int(differs_N.int().argmax()) // TILE_MULTIPLE * TILE_MULTIPLE if differs_N.any() else longest


Request = tuple[int, int, int, int]
"""(row, first token in the flat batch, query tokens, context length after them)."""


class _Call:
    """One call of the attention op: its requests as index tensors."""

    def __init__(self, requests: Sequence[Request], table: Tensor) -> None:
        self.tokens = torch.cat([torch.arange(first, first + count) for _, first, count, _ in requests])
        counts = torch.tensor([count for _, _, count, _ in requests])
        self.decodes = bool((counts == 1).all())
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
        self.seq_lens = torch.tensor([context for *_, context in requests], dtype=torch.int32)
        self.block_table = table[[row for row, *_ in requests]].contiguous()
        self._schedules: dict[tuple[Any, ...], Tensor] = {}

    def schedule(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, isa: str) -> Tensor:
        key = (heads, kv_heads, dim, dtype, isa)
        if key not in self._schedules:
            self._schedules[key] = ops().cpu_attn_get_scheduler_metadata(
                num_reqs=len(self.seq_lens),
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=dim,
                seq_lens=self.seq_lens,
                dtype=dtype,
                query_start_loc=self.starts,
                causal=True,
                sliding_window_size=-1,
                isa=isa,
                enable_kv_split=False,
            )
        return self._schedules[key]


def rotary_embedding(positions_N: Tensor, q: Tensor, k: Tensor, head_dim: int, cos_sin: Tensor) -> None:
    """vLLM's RoPE op, in place on q [N, H*D] and k [N, G*D]; `cos_sin` [positions, D]. For parity checks."""
    ops().rotary_embedding(positions_N, q, k, head_dim, cos_sin, True)


class W8A8Weight:
    """An int8 weight in oneDNN's layout, with scale and bias; outputs have `dtype`."""

    def __init__(self, q_NK: Tensor, scale_N1: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> None:
        self.handler = ops().create_onednn_scaled_mm(q_NK.t(), scale_N1, dtype, True, False, 32)
        self.outputs, self.bias_N, self.dtype = q_NK.shape[0], bias_N, dtype


def w8a8_linear(x_MK: Tensor, weight: W8A8Weight) -> Tensor:
    """vLLM's oneDNN W8A8 layer: [M, N]."""
    q_x, scale_x, _ = ops().onednn_scaled_int8_quant(x_MK.contiguous(), None, None, True)
    out_MN = torch.empty(x_MK.shape[0], weight.outputs, dtype=weight.dtype)
    ops().onednn_scaled_mm(weight.handler, q_x, out_MN, scale_x, None, None, weight.bias_N)
    return out_MN


def w4a16_linear(x_MK: Tensor, layout: Tensor, scale_GN: Tensor, bias_N: Tensor | None) -> Tensor:
    """vLLM's CPU W4A16 layer, bfloat16: [M, N]. `layout` is `qarl.quant.int4.engine_w4a16_layout`'s."""
    return ops().cpu_gemm_wna16(x_MK.contiguous(), layout, scale_GN, None, bias_N, 8, "vec")


def experts(x_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor, gate_up_XFE: Tensor, down_XEI: Tensor) -> Tensor:
    """vLLM's fused experts without quantization: [N, E]. A token's value does not depend on the others.

    The weights are laid out anew at each call, a few per cent of the GEMM's time, so that nothing can be stale.
    Raises KernelError for widths that the op does not take.
    """
    if x_NE.shape[1] % 32 or down_XEI.shape[2] % 32:
        what = f"the engine's experts need widths divisible by 32, got {x_NE.shape[1]} and {down_XEI.shape[2]}"
        raise KernelError(what, hint="set learner.numerics=portable")
    w13, w2 = (ops().cpu_prepack_moe_weight(weight.detach(), "vec") for weight in (gate_up_XFE, down_XEI))

    def call(out: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> None:
        ops().cpu_fused_moe(out, x, w13, w2, None, None, weights, ids, "silu", "vec")

    return _in_chunks(call, x_NE, ids_NK, weights_NK)


def _in_chunks(call: Callable[..., None], x_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    out_NE = torch.empty_like(x_NE, memory_format=torch.contiguous_format)
    inputs = (out_NE, x_NE.contiguous(), weights_NK.float().contiguous(), ids_NK.to(torch.int32).contiguous())
    for chunk in zip(*(t.split(EXPERT_CHUNK) for t in inputs), strict=True):
        call(*chunk)
    return out_NE


class Int8Experts:
    """vLLM's fused W8A8 experts, for weights int8 [X, 2I, E] and [X, E, I] with float32 scales [X, 2I, 1], [X, E, 1].

    Calling it gives [N, E] as `experts` does. Raises KernelError where the op is missing: it needs AVX-512.
    """

    def __init__(self, weights: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor]) -> None:
        self._ops = ops()
        if not hasattr(torch.ops._C, "fused_experts_cpu"):
            raise KernelError("this processor has no int8 experts in vLLM", hint="set learner.kernel=torch")
        self._weights = [torch.ops._C.convert_weight_packed(weight) for weight in weights]
        self._scales = scales

    def __call__(self, x_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        method = self._ops.CPUQuantMethod.INT8_W8A8

        def call(out: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> None:
            rest = (None, None, None)  # zero points and block size: the grid is symmetric, per channel
            self._ops.fused_experts_cpu(out, x, *self._weights, weights, ids, method, *self._scales, *rest)

        return _in_chunks(call, x_NE, ids_NK, weights_NK)
