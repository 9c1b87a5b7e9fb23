"""`qarl bench learner`, `kernels` and `publish` on the smallest shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch.cli import main
from launch.tools.bench.compare import Case, compare
from launch.tools.bench.publish import count_bytes, make_model, quantized_again
from qarl.numerics import engine_ops, processor
from qarl.quant.kernels import low_bit_kernels
from qarl.quant.publish import checkpoint_tensors, publish
from qarl.quant.scheme import QuantScheme
from qarl.weights.wire import pack
from trainer.policy import Policy


def test_ratios_are_medians_of_rounds_taken_in_turn() -> None:
    """The clock is read before and after each run. The first round, of 9 and 9 s, is not timed."""
    order: list[str] = []
    ticks: Iterator[float] = iter([0, 9, 9, 18, *(0, 1, 1, 4), *(0, 1, 1, 4), *(0, 2, 2, 4)])
    runs = {name: lambda name=name: order.append(name) for name in ("plain", "ours")}  # type: ignore[misc]
    rows = compare(Case("what", runs, {"ours": 2.0}), 3, lambda: float(next(ticks)))
    assert order == ["plain", "ours"] * 4
    assert rows == [
        "| what: plain | 1000.00 | 1.00 | 1.00 to 1.00 |  |",
        "| what: ours | 3000.00 | 3.00 | 1.00 to 3.00 | <= 2: MISSED |",
    ]


@pytest.mark.slow
@pytest.mark.skipif(not engine_ops.available(), reason="vLLM is not installed")
def test_bench_learner_measures_layers_blocks_and_profiles(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.tools.bench import learner

    monkeypatch.setattr(learner, "BATCH_TOKENS", 80)
    monkeypatch.setattr(learner, "HEAD_VOCABULARY", 4096)
    assert main(["bench", "learner", "--hidden", "128", "--tokens", "40", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    wanted = ["128 to 384, forward + backward: torch._int_mm", "once a step: vllm.onednn_scaled_mm, preparation"]
    wanted += ["block 128, forward: w8a8_int8, engine", "w8a8_int8, 2 x 40 tokens: engine"]
    has = processor.has_avx512()
    wanted += ["w4a16, 2 x 40 tokens: portable" if has else "| w4a16: rollout.scheme: vLLM has no w4a16 kernel on"]
    wanted += ["head, float32, 512 tokens, forward: fixed rows", "512 tokens, forward + backward: in chunks"]
    for what in wanted:
        assert what in out
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| ")][1:]
    assert {len(row) for row in rows} == {7}
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows if has or " w4a16: rollout" not in row[1])


def test_bench_kernels_takes_every_low_bit_kernel_of_a_device() -> None:
    from launch.tools.bench.kernels import bench_on

    lines = list(bench_on(torch.device("cpu"), [128], [3], rounds=1))
    names = {line.split("|")[1].partition(": ")[2].strip() for line in lines if "3 tokens, 128 to 384" in line}
    missing = set() if processor.has_avx512() or not engine_ops.available() else {"w4a16, engine"}
    assert names == {"bfloat16", *(f"{scheme}, {kind}" for scheme, kind in low_bit_kernels("cpu"))} - missing
    assert all(any(line.startswith(f"| {name}: ") for line in lines) for name in missing)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bench_kernels_without_cuda_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels"]) == 2
    assert capsys.readouterr().err == "qarl: no CUDA device on this machine; run it where there is one\n"


@pytest.mark.parametrize(
    ("width", "kind"), [("0", "whole number"), ("100", "multiple of 128"), ("wide", "whole number")]
)
def test_bench_widths_are_multiples_of_128(width: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "learner", "--hidden", width])
    assert f"'{width}' is not a {kind}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scheme", "share"),
    [
        (QuantScheme(), 0.5),
        (QuantScheme("fp8_channel"), 0.5),
        (QuantScheme("w4a16", group_size=128), 0.25 + 2 / 128 / 2),
        (QuantScheme("w4a16", group_size=32), 0.25 + 2 / 32 / 2),
    ],
)
def test_bench_publish_counts_bytes_and_has_a_fair_alternative(
    scheme: QuantScheme, share: float, tmp_path: Path
) -> None:
    """The alternative's engine gets the very tensors that a publication sends; bytes are those of the format."""
    make_model(tmp_path / "model", hidden=128, layers=1)
    policy = Policy(tmp_path / "model", torch.bfloat16, scheme, "stock", kernel="reference")
    tensors = checkpoint_tensors(policy.model, quantized=False)
    save_file({name: tensor.clone() for name, tensor in tensors}, tmp_path / "step.safetensors")
    again = {name: pack(name, tensor).digest for name, tensor in quantized_again(tmp_path / "step.safetensors", scheme)}
    assert again == {tensor.name: tensor.digest for tensor in publish(policy.model, scheme, 0).tensors}
    line = count_bytes(policy, scheme)
    assert line.startswith(f"{scheme.label}: ")
    counted = float(line.rpartition(" ")[2])
    assert share <= counted < share + 0.04  # scales of channels, and the shape that int4 layers carry
