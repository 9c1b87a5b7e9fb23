"""The keys of the prompt pool. `docs/prompt_pool.md` tells what they do together."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from qarl.config_base import Count, Fraction, Node, NonNegativeFloat, PositiveFloat, PositiveInt


class RetireConfig(Node):
    """Prompts that are always or never solved leave the draws, and come back from time to time to be checked."""

    after_visits: Count = 0
    """Observed draws before a prompt may retire; 0 never retires."""
    solved_above: Fraction = 1.0
    """Measured success rate from which a prompt counts as solved."""
    hopeless_below: Fraction = 0.0
    """Measured success rate up to which a prompt counts as hopeless."""
    recheck_after_steps: PositiveInt = 50
    """Steps after which a retired prompt may be drawn again; the result decides anew."""


class LineageConfig(Node):
    """Prompts made from others lend each other evidence."""

    refresh_every: Count = 0
    """Steps between re-estimations of parents from their children; 0 never."""
    aggregate: Literal["children", "path"] = "children"
    """`children`: every child counts alike. `path`: by the number of its leaf descendants."""
    estimate_strength: PositiveFloat = 2.0
    """Pseudo-trials that an estimate weighs against measured ones."""


class ArchiveConfig(Node):
    """Evicted prompts are remembered and may come back."""

    capacity: Count = 0
    """Evicted prompts that are remembered, the latest ones; 0 forgets them all."""
    reinsert_per_step: Count = 0
    """Archived prompts considered per step, longest archived first."""
    rest_steps: PositiveInt = 50
    """Steps in the archive before a prompt is considered."""


class PoolConfig(Node):
    strategy: Literal["frontier", "uniform", "median", "prioritised", "easy_to_hard"] = "frontier"
    """`frontier`: prompts whose success rate is nearest to `target`. `uniform`: every prompt alike. `median`: nearest
    to the median of the last rewards, as HeaPA published. `prioritised`: at random, more often the nearer to `target`.
    `easy_to_hard`: passes over the data, each by level and then by success rate."""
    target: Fraction = 0.5
    """Target success rate: where the two heaps meet."""
    exploration: Fraction = 0.25
    """Share of a draw kept for unseen and stale prompts."""
    cooldown_steps: Count = 2
    """Steps that an observed prompt rests before it may be drawn again."""
    decay: Fraction = 0.7
    """Weight of old trials at each new visit."""
    prior_strength: PositiveFloat = 2.0
    """Pseudo-trials of the Beta prior, centred on `target`."""
    stale_after_steps: PositiveInt = 20
    """Steps unvisited after which a prompt counts as stale."""
    reach: Fraction = 1.0
    """`frontier`: seen prompts further than this from `target` are drawn only when no unseen ones are left. Helps the
    start of a run, when the nearest seen prompts are still far away."""
    priority_exponent: NonNegativeFloat = 1.0
    """`prioritised`: weight = nearness to `target` (1 there, 0 at the far end) to this power; 0 is uniform."""
    capacity: PositiveInt | None = None
    """Most prompts in the pool, in flight included; a new one evicts the furthest from `target`. null: no bound."""
    retire: RetireConfig = RetireConfig()
    """Solved and hopeless prompts."""
    lineage: LineageConfig = LineageConfig()
    """Prompts made from others."""
    archive: ArchiveConfig = ArchiveConfig()
    """Evicted prompts."""

    @model_validator(mode="after")
    def _archive_has_a_source(self) -> PoolConfig:
        if self.archive.capacity and self.capacity is None:
            raise ValueError("pool.archive.capacity: nothing is ever evicted without pool.capacity; set both")
        return self
