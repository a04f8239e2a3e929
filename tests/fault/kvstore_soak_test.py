"""The mixed load over all tiers at their capacity: fifteen seconds in the suite, half an hour where slow tests run.

Nothing is wrong, nothing hangs, nothing grows, nothing is left. The figures are printed (`pytest -s`).
"""

import pytest

from loadtest.soak_store import soak

CALL_S = 10.0
"""The load's own deadline of a call."""
SLACK_S = 5.0


def judge(report):
    print(report.figures(), dict(sorted(report.operations.items())), report.tiers)
    assert report.mismatches == []
    assert report.errors == []
    assert set(report.left.values()) == {0}
    assert report.slowest_s < CALL_S + SLACK_S
    for outcome in ("read.hit", "read.miss", "read_into.hit", "stream.hit", "write.stored", "drop.dropped", "pin.held"):
        assert report.operations[outcome] > 0, f"the load never saw {outcome}"


def test_short_load_is_right_and_leaves_nothing():
    judge(soak(seconds=15.0, log=print))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_half_an_hour_of_load_grows_nothing():
    report = soak(seconds=1800.0, log=print)
    judge(report)
    assert report.growth(lambda sample: sample.rss_bytes) < 1.1
    assert report.growth(lambda sample: sample.descriptors) < 1.1
    # Pools start their threads as they are needed, up to their bounds: a load that gets faster finds more of them.
    assert report.growth(lambda sample: sample.threads) < 1.25
