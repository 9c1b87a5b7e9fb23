"""What a person should hear of while a run goes on."""

from collections import deque
from collections.abc import Iterator, Mapping
from statistics import fmean

from qarl.config.run import Config

WINDOW = 8
"""Steps whose mean reward is compared."""

Alert = tuple[str, str]
"""Title and text."""


class Alerts:
    """Watches the metrics of a run. Each alert comes once, and again only after a step without its cause."""

    def __init__(self, config: Config) -> None:
        self._bound, self._drop = config.mismatch.warn_above, config.tracking.alert_reward_drop
        self._rewards = deque[float](maxlen=WINDOW)
        self._best: float | None = None
        self._active = set[str]()

    def observe(self, step: int, values: Mapping[str, float]) -> Iterator[Alert]:
        """The alerts that the metrics of `step` give reason for."""
        if self._bound is not None and "mismatch/logp_abs_max" in values:
            size, mean = values["mismatch/logp_abs_max"], values.get("mismatch/logp_abs_mean", 0.0)
            text = (
                f"step {step}: max |d log p| {size:.2e} is above mismatch.warn_above={self._bound:g}, mean {mean:.2e}; "
                "the next warning comes after a step below it"
            )
            yield from self._once("mismatch above its bound", text, not size <= self._bound)
        if self._drop is not None and "reward/mean" in values:
            self._rewards.append(values["reward/mean"])
            if len(self._rewards) == WINDOW:
                mean = fmean(self._rewards)
                best = self._best = mean if self._best is None else max(self._best, mean)
                text = f"step {step}: mean reward {mean:.3f} over {WINDOW} steps, after {best:.3f} at best"
                # A share of a reward below 0 says nothing.
                yield from self._once("reward collapse", text, best > 0 and mean < (1 - self._drop) * best)

    def _once(self, title: str, text: str, is_so: bool) -> Iterator[Alert]:
        if is_so and title not in self._active:
            yield title, text
        (self._active.add if is_so else self._active.discard)(title)
