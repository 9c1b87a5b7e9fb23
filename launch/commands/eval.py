"""Sample and judge held-out prompts with a run's final model or another one, in one or several schemes."""

import argparse

from launch.arguments import add_formats, add_overrides, number_in, path, path_text, positive_int, schemes

EXAMPLES = """\
  qarl eval runs/quickstart
  qarl eval runs/quickstart --formats none w8a8_int8 --num-samples 16
  qarl eval smollm2_chain_sum --model my_model --temperature 0.6 --top-p 0.95"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        type=path_text,
        metavar="RUN",
        help="folder of a run, or a config (its task, and the model it starts from)",
    )
    add_overrides(parser)
    add = parser.add_argument
    add("--model", type=path, help="a Hugging Face model folder in place of the run's")
    add_formats(add, "--formats", "formats to compare (default: that of the rollouts)", nargs="+")
    add("--num-prompts", type=positive_int, help="held-out prompts (default: eval.final_num_prompts)")
    add("--num-samples", type=positive_int, help="responses to each (default: eval.num_samples)")
    add("--max-new-tokens", type=positive_int, help="longest response (default: as in training)")
    add("--temperature", type=number_in(0, 100), default=1.0, help="0 is greedy (default: 1)")
    add("--top-p", type=number_in(0.001, 1), default=1.0, help="(default: 1, no mask)")
    add("--top-k", type=positive_int, default=0, help="(default: no mask)")
    add("--min-p", type=number_in(0, 1), default=0.0, help="(default: 0, no mask)")
    add("--seed", type=int, help="of the samples (default: the config's)")
    add("--out", type=path, help="folder of the samples and figures; an evaluation there continues (default: RUN/eval)")


def run(args: argparse.Namespace) -> int:
    from launch.tools.evaluation.settings import Sampling, config_for, config_of

    config = config_of(args.what, args.overrides, args.model)
    sampling = Sampling(
        args.num_samples or config.eval.num_samples,
        args.max_new_tokens or config.rollout.sampling.max_new_tokens,
        args.temperature,
        args.top_p,
        args.top_k,
        args.min_p,
        config.seed if args.seed is None else args.seed,
    )
    number = args.num_prompts or config.eval.final_num_prompts
    config = config_for(config, sampling, number)
    from launch.run.terminal import console
    from launch.tools.evaluation.evaluate import evaluate
    from launch.tools.evaluation.report import table
    from qarl.config.schedule import scheme_at
    from qarl.quant.scheme import QuantScheme

    rollout = config.rollout
    formats = [schemes()[label] for label in dict.fromkeys(args.formats or ())]
    chosen = [QuantScheme.of(one.name, rollout.ignore, one.group_size) for one in formats]
    chosen = chosen or [scheme_at(rollout, config.train.steps)]
    out = args.out or config.run.folder / "eval"
    found = evaluate(config, chosen, sampling, number, out)
    console().print(table(found))
    print(f"samples and figures: {out}")
    return 0
