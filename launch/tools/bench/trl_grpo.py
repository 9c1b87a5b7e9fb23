"""Steps of TRL's GRPOTrainer for `qarl bench e2e`; runs in TRL's own environment and imports nothing of qarl.

    python -P trl_grpo.py work.json     prints one JSON line a step: seconds, seconds of generation, response tokens

`-P` keeps the files beside it from hiding packages of their names.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Prints a line after the last minibatch of each step."""

    def __init__(self, minibatches: int) -> None:
        self.minibatches = minibatches
        self.started, self.generate_seconds, self.tokens = time.perf_counter(), 0.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.minibatches:
            return
        now = time.perf_counter()
        row = {"step": now - self.started, "sample": self.generate_seconds, "tokens": self.tokens}
        print("qarl-bench", json.dumps(row), flush=True)
        self.started, self.generate_seconds, self.tokens = now, 0.0, 0


def main(work: dict[str, Any]) -> None:
    from datasets import Dataset  # only TRL's environment has these
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"]))
    for row in work["prompts"]:
        if tokenizer(row["prompt"])["input_ids"] != row.pop("ids"):
            raise SystemExit(f"TRL reads this prompt as other tokens: {row['prompt']!r}")
    clock, generate = Clock(work["minibatches"]), model.generate

    def timed_generate(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = generate(*args, **kwargs)
        clock.generate_seconds += time.perf_counter() - started
        return result

    def reward(completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        clock.tokens += sum(map(len, completion_ids))
        found = [re.findall(work["answer_pattern"], text) for text in completions]
        return [float(bool(texts) and texts[-1] == right) for texts, right in zip(found, answer, strict=True)]

    model.generate = timed_generate
    settings = GRPOConfig(
        output_dir=work["output"],
        use_cpu=True,
        bf16=work["dtype"] == "bfloat16",
        per_device_train_batch_size=work["rollouts"] // work["minibatches"],
        steps_per_generation=work["minibatches"],
        gradient_accumulation_steps=1,
        num_generations=work["group_size"],
        max_completion_length=work["max_new_tokens"],
        generation_kwargs={"min_new_tokens": work["max_new_tokens"]},  # no end token, which would mask what follows
        temperature=work["temperature"],
        max_steps=work["steps"] * work["minibatches"],
        learning_rate=work["lr"],
        gradient_checkpointing=False,
        beta=0.0,
        seed=work["seed"],
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_list(work["prompts"])
    GRPOTrainer(model, reward, settings, data, processing_class=tokenizer, callbacks=[clock]).train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
