"""Seconds of tests/serving/soak.py, which is for an hour."""

import logging

import pytest

from tests.serving.soak import Soak


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_grows(engine, caplog):
    caplog.set_level(logging.ERROR, "mythos_jax")  # each listener that is gone has a line
    with Soak(engine).listening() as soak:
        for _ in range(4):
            soak.round(12)
    soak.check(warm=2, rss_growth=24)
    total = soak.total
    assert {"length", "stop", "cancelled"} == total.reasons.keys()
    assert total.repeated > 0
    assert total.refused > 0
