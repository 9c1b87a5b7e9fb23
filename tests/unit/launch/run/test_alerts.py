import math

from launch.run.alerts import WINDOW, Alerts
from qarl.config.io import validate
from qarl.config.run import Config


def config(**sections: object) -> Config:
    return validate({"model": {"path": "m"}, "task": {"kind": "sorting"}, **sections}, "test")


def test_each_crossing_of_the_mismatch_bound_warns_once() -> None:
    alerts = Alerts(config(mismatch={"warn_above": 0.05}))
    gaps = {1: 0.0, 2: 0.1, 3: 0.1, 4: 0.0, 5: math.nan, 6: 0.1, 7: 0.05}
    found = [alert for step, gap in gaps.items() for alert in alerts.observe(step, {"mismatch/logp_abs_max": gap})]
    assert [text.partition(":")[0] for _, text in found] == ["step 2", "step 5"]
    assert found[0][0] == "mismatch above its bound"
    assert "max |d log p| 1.00e-01 is above mismatch.warn_above=0.05" in found[0][1]
    assert list(Alerts(config()).observe(1, {"mismatch/logp_abs_max": 9.0})) == []


def test_a_collapse_of_the_reward_is_told_once_until_it_recovers() -> None:
    alerts = Alerts(config())
    rewards = [0.8] * WINDOW + [0.0] * WINDOW + [0.8] * WINDOW + [0.0] * WINDOW
    found = [step for step, reward in enumerate(rewards) for _ in alerts.observe(step, {"reward/mean": reward})]
    half = WINDOW // 2
    assert found == [WINDOW + half, 3 * WINDOW + half]
    never = Alerts(config(tracking={"alert_reward_drop": None}))
    assert not any(list(never.observe(step, {"reward/mean": reward})) for step, reward in enumerate(rewards))


def test_a_reward_below_0_is_no_collapse() -> None:
    rising = [-5.0 + 0.1 * step for step in range(6 * WINDOW)]
    alerts = Alerts(config())
    assert not any(list(alerts.observe(step, {"reward/mean": reward})) for step, reward in enumerate(rising))
    fallen = [*[-2.0] * WINDOW, *[1.0] * WINDOW, *[-2.0] * WINDOW]
    alerts = Alerts(config())
    found = [step for step, reward in enumerate(fallen) for _ in alerts.observe(step, {"reward/mean": reward})]
    assert found == [2 * WINDOW + 1]
