"""Rooflines by hand, and what must hold of them for any device."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.tools.plan.devices import GPUS, Device
from launch.tools.plan.memory import Variant
from launch.tools.plan.speed import Load, Training, decode_step, learner, prefill, publication, rollout
from qarl.quant.formats import FORMATS
from qarl.quant.scheme import SchemeName
from tests.support.plan_models import QWEN2_5_7B, QWEN3_30B_A3B, shapes

PLAIN = Variant(shapes(QWEN2_5_7B))
LINEARS = frozenset(m.name for m in PLAIN.shapes.matrices if m.name != "lm_head")
SCHEMES: tuple[SchemeName, ...] = ("w8a8_int8", "w4a16")
INT8, INT4 = (Variant(PLAIN.shapes, FORMATS[name], LINEARS) for name in SCHEMES)
LINEAR, HEAD = 6_525_288_448, 152064 * 3584

ROUND = Device(
    name="round",
    kind="cuda",
    capability=90,
    memory=80e9,
    bandwidth=1e12,
    link=1e10,
    rates={"bf16": 1e15, "int8": 2e15, "weight_only": 0.9e15},
    source="round figures",
    bandwidth_efficiency=1.0,
    gemm_efficiency=1.0,
    learner_efficiency=1.0,
    step_s=0.0,
    sequence_s=0.0,
)
LOAD = Load(samples=32, prompt_tokens=100, response_tokens=1000, longest=1000, workers=2, ranks=2, minibatches=4)


def test_one_sequence_reads_all_weights_once() -> None:
    attention = 57_344 * 1000 / 1e12
    assert decode_step(PLAIN, ROUND, 1, 1000) == pytest.approx((2 * (LINEAR + HEAD)) / 1e12 + attention, rel=1e-9)
    scales = 4 * 28 * 49_664
    assert decode_step(INT8, ROUND, 1, 1000) == pytest.approx((LINEAR + scales + 2 * HEAD) / 1e12 + attention, rel=1e-9)


def test_a_large_batch_computes() -> None:
    """At 10^5 sequences without context every GEMM is bound by its arithmetic."""
    batch = 10**5
    assert decode_step(PLAIN, ROUND, batch, 0) == pytest.approx(2 * (LINEAR + HEAD) * batch / 1e15)
    assert decode_step(INT8, ROUND, batch, 0) == pytest.approx(2 * batch * (LINEAR / 2e15 + HEAD / 1e15))
    assert decode_step(INT4, ROUND, batch, 0) == pytest.approx(2 * batch * (LINEAR / 0.9e15 + HEAD / 1e15))


def test_overheads_and_devices_that_do_not_overlap() -> None:
    slow = replace(ROUND, step_s=0.5, sequence_s=0.25)
    assert decode_step(PLAIN, slow, 4, 10) == pytest.approx(decode_step(PLAIN, ROUND, 4, 10) + 0.5 + 4 * 0.25)
    assert ROUND.seconds(1e12, 3e15, "bf16") == 3.0
    assert replace(ROUND, overlaps=False).seconds(1e12, 3e15, "bf16") == 4.0
    assert replace(ROUND, bandwidth_efficiency=0.1, gemm_efficiency=0.5).seconds(1e12, 1e15, "bf16") == 10.0


def test_experts_are_read_as_a_batch_touches_them() -> None:
    moe = Variant(shapes(QWEN3_30B_A3B))
    expert = 48 * 3 * 768 * 2048 * 2 / 1e12  # seconds to read one expert of every layer
    dense = decode_step(moe, ROUND, 1, 0) - 8 * expert
    assert dense == pytest.approx(2 * (48 * (2 * 4096 + 2 * 512) * 2048 + 151936 * 2048) / 1e12)
    assert decode_step(moe, ROUND, 2, 0) == pytest.approx(dense + 15.5 * expert)


def test_prefill_is_arithmetic() -> None:
    attention = 2 * 8 * 100**2 * 28 * 128 * 28
    flops = 2 * LINEAR * 800 + 2 * HEAD * 8 + attention
    assert prefill(PLAIN, ROUND, 8, 100) == pytest.approx(flops / 1e15)


def test_rollout_takes_full_batches_and_a_rest() -> None:
    step = {batch: decode_step(PLAIN, ROUND, batch, 600) for batch in (6, 4)}
    # 16 samples a worker, 6 at once: two full batches and one of 4, 1000 steps each
    seconds = 1000 * (2 * step[6] + step[4]) + prefill(PLAIN, ROUND, 16, 100)
    assert rollout(PLAIN, ROUND, LOAD, 6) == pytest.approx(seconds)


def test_learner_by_hand() -> None:
    """16 samples of 1,100 tokens on each of two ranks; the head on response tokens only."""
    work = 2 * (LINEAR * 16 * 1100 + HEAD * 16 * 1000)
    attention = 2 * 16 * 1100**2 * 28 * 128 * 28
    optimizer = 4 * 34 * 7_615_616_512 / 2 / 1e12
    assert learner(Training(PLAIN, "bf16"), ROUND, LOAD) == pytest.approx(
        (4 * work + 4.5 * attention) / 1e15 + optimizer
    )
    low = Training(INT8, "int8", rounding_bytes=(39, 30))
    # two int8 forwards instead of dense ones, and rounding: 39 B an input, 30 B an output feature, twice
    saved = 2 * 2 * LINEAR * 16 * 1100 * (1 / 1e15 - 1 / 2e15)
    inputs = 28 * (3584 * 6 + 18944)
    rounding = 2 * 16 * 1100 * (39 * inputs + 30 * 28 * 49_664) / 1e12
    assert learner(low, ROUND, LOAD) == pytest.approx(learner(Training(PLAIN, "bf16"), ROUND, LOAD) - saved + rounding)
    without = learner(Training(PLAIN, "bf16", prox=False), ROUND, LOAD)
    again = learner(Training(PLAIN, "bf16", checkpointing=True), ROUND, LOAD)
    both = learner(Training(PLAIN, "bf16"), ROUND, LOAD)
    assert again - both == pytest.approx(both - without) == pytest.approx((work + attention) / 1e15)


def test_publication_by_hand() -> None:
    size = INT8.published_bytes
    per_byte = 2 / 2.7e9 + 2 / 6.5e9 + 3 / 1e10
    linears, head = 2 * 2 * 128 * LINEAR, 2 * 2 * 128 * HEAD / 1e15
    assert publication(INT8, ROUND) == pytest.approx(40 * LINEAR / 1e12 + size * per_byte + linears / 2e15 + head)
    plain = PLAIN.published_bytes * per_byte + linears / 1e15 + head
    assert publication(PLAIN, ROUND) == pytest.approx(plain)
    # on CPU the engine packs every layer again
    assert publication(PLAIN, replace(ROUND, kind="cpu")) == pytest.approx(plain + 1.3e-8 * (LINEAR + HEAD))


@given(
    batch=st.integers(1, 2048),
    context=st.integers(0, 32_768),
    device=st.sampled_from(GPUS),
    variant=st.sampled_from([PLAIN, INT8, INT4]),
    overlaps=st.booleans(),
)
def test_decoding_is_never_faster_than_its_bytes_or_its_arithmetic(
    batch: int, context: int, device: Device, variant: Variant, overlaps: bool
) -> None:
    device = replace(device, overlaps=overlaps)
    step = decode_step(variant, device, batch, context)
    read = variant.engine_weights - variant.shapes.others * 2 + batch * context * variant.shapes.kv_bytes
    assert step * device.bandwidth >= read
    assert step * max(device.rates.values()) >= 2 * (LINEAR + HEAD) * batch
    assert decode_step(variant, device, batch + 1, context) >= step
    assert decode_step(variant, device, batch, context + 1) >= step
    assert decode_step(variant, device, batch, context) / batch >= decode_step(variant, device, 2 * batch, context) / (
        2 * batch
    ) * (1 - 1e-12)
