"""`qarl bench WHAT`: the arguments of every benchmark. What they need is imported when they run."""

from __future__ import annotations

import argparse
from typing import Any

from launch.arguments import multiple_of_128, positive_int


def add_bench_commands(commands: Any) -> None:
    """Add `bench` and its parts to argparse's `commands`."""
    bench = commands.add_parser("bench", help="measure a part on this machine").add_subparsers(
        required=True, metavar="WHAT"
    )
    pool = bench.add_parser("pool", help="time and memory of the prompt pool, by size and strategy")
    pool.add_argument("--sizes", type=positive_int, nargs="+", default=[10_000, 100_000, 1_000_000], metavar="PROMPTS")
    pool.add_argument("--batch", type=positive_int, default=512, help="prompts of one draw (512)")
    pool.add_argument("--steps", type=positive_int, default=1000, help="timed steps (1000: heaps compact on the way)")
    pool.set_defaults(run=_bench_pool)
    bench.add_parser("objectives", help="every loss beside a plain masked mean").set_defaults(run=_bench_objectives)
    learner = bench.add_parser("learner", help="aligned linears beside bfloat16, exact numerics beside stock, on CPU")
    learner.add_argument("--hidden", type=multiple_of_128, nargs="*", default=[1024, 2048], help="widths (1024 2048)")
    learner.add_argument("--tokens", type=positive_int, nargs="*", default=[256, 1500], help="lengths (256 1500)")
    learner.add_argument("--rounds", type=positive_int, default=5, help="timed rounds (5)")
    learner.set_defaults(run=_bench_learner)
    publish = bench.add_parser("publish", help="a publication beside a bfloat16 checkpoint quantized again, on CPU")
    publish.add_argument("--hidden", type=multiple_of_128, default=1024, help="width (1024)")
    publish.add_argument("--layers", type=positive_int, default=4, help="(4)")
    publish.add_argument("--rounds", type=positive_int, default=5, help="timed rounds (5)")
    publish.set_defaults(run=_bench_publish)
    kernels = bench.add_parser("kernels", help="every low-bit linear on CUDA beside bfloat16")
    kernels.add_argument("--hidden", type=multiple_of_128, nargs="+", default=[2048, 4096], help="widths (2048 4096)")
    kernels.add_argument("--tokens", type=positive_int, nargs="+", default=[1, 64, 1024, 8192], help="(1 64 1024 8192)")
    kernels.add_argument("--rounds", type=positive_int, default=20, help="timed rounds (20)")
    kernels.set_defaults(run=_bench_kernels)


def _bench_pool(args: argparse.Namespace) -> None:
    from launch.tools.bench.pool import measure, table

    for line in table(measure(args.sizes, args.batch, args.steps)):
        print(line, flush=True)


def _bench_objectives(_: argparse.Namespace) -> None:
    from launch.tools.bench.objectives import main as bench

    bench()


def _bench_learner(args: argparse.Namespace) -> None:
    from launch.tools.bench.learner import bench

    for line in bench(args.hidden, args.tokens, args.rounds):
        print(line, flush=True)


def _bench_publish(args: argparse.Namespace) -> None:
    from launch.tools.bench.publish import bench

    for line in bench(args.hidden, args.layers, args.rounds):
        print(line, flush=True)


def _bench_kernels(args: argparse.Namespace) -> None:
    from launch.tools.bench.kernels import bench_cuda

    for line in bench_cuda(args.hidden, args.tokens, args.rounds):
        print(line, flush=True)
