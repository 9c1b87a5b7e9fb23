"""What `qarl plan` adds for a run that samples ahead of learning: its step in virtual time, which is no sum of its
parts, and the best split of its devices."""

from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType

from launch.arguments import NETWORK
from launch.tools.plan.devices import Device
from launch.tools.plan.result import Plan
from launch.tools.simulate.command import Simulator, table, tree
from launch.tools.simulate.simulate import Outcome
from qarl.config.run import Config
from qarl.errors import ConfigError


@dataclass(frozen=True)
class Ahead:
    """A simulation for a plan, or why there is none."""

    outcome: Outcome | None = None
    best_split: Outcome | None = None
    """Of as many devices as the run has; None where engines and learner share one."""
    refused: str = ""

    def to_tree(self) -> dict[str, Any]:
        """For JSON."""
        outcome, best = (None if found is None else tree(found) for found in (self.outcome, self.best_split))
        return {"outcome": outcome, "best_split": best, "refused": self.refused}

    def render(self) -> RenderableType:
        """For the terminal."""
        if self.outcome is None:
            return f"The step that samples ahead is not simulated: {self.refused}"
        rows = [self.outcome]
        if self.best_split not in (None, self.outcome):
            rows.append(self.best_split)
        return Group(table("Simulated steps, which sample ahead", rows), self._verdict(self.outcome))

    def _verdict(self, own: Outcome) -> str:
        best = self.best_split
        if best is None:
            return "Engines and learner share their device."
        devices = f"{best.workers + best.ranks} devices"
        if best == own:
            return f"No split of the {devices} that was tried is faster."
        gain = best.responses_per_s / own.responses_per_s
        return f"The best split of the {devices}: {best.workers} workers and {best.ranks} ranks, {gain:.2f}x as fast."


def simulate_ahead(config: Config, plan: Plan, device: Device, has_lengths: bool) -> Ahead:
    """Simulate a planned run without faults, with the plan's prompts, responses and measured speeds.

    Args:
        has_lengths: the plan was given a mean length. Else all its responses have the most tokens, as here.
    """
    own = Simulator(device, plan.prompt_tokens, plan.response_tokens, network=NETWORK * 1e9, slowdown=plan.slowdown)
    simulator = own if has_lengths else replace(own, spread=0.0)
    try:
        outcome = simulator.simulate(config)
        on_gpus = device.kind == "cuda"
        if config.cluster.colocate if on_gpus else config.cluster.address is None:
            return Ahead(outcome)
        splits = simulator.splits(config, outcome.workers + outcome.ranks)
    except ConfigError as error:
        return Ahead(refused=str(error))
    return Ahead(outcome, max((outcome, *splits), key=lambda one: one.responses_per_s))
