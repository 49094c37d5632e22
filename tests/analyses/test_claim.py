"""Verdicts follow from the numbers alone."""

import math

import pandas as pd
import pytest

from analyses.claim import at_least, at_most, by_seed, equal, untestable

WORDS = ("It holds.", "S116, section 2", "a value")


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        (equal(*WORDS, [0.9, 1.0, 1.1], 1.0, tolerance=0.11), "reproduced"),
        (equal(*WORDS, [0.9, 1.0, 1.3], 1.0, tolerance=0.11), "partly"),
        (equal(*WORDS, [2.0, 3.0, 4.0], 1.0, tolerance=0.11), "not reproduced"),
        (equal(*WORDS, [1.0, 1.0, math.nan], 1.0, tolerance=0.11), "partly"),
        (at_most(*WORDS, [1.0, 2.0], 2.0), "reproduced"),
        (at_most(*WORDS, [1.0, 2.1], 2.0), "partly"),
        (at_most(*WORDS, [math.inf, math.nan], 2.0), "not reproduced"),
        (at_least(*WORDS, [2.0, 3.0], 2.0), "reproduced"),
        (at_least(*WORDS, [1.0, 1.5], 2.0), "not reproduced"),
        (untestable(*WORDS, [1.0, 1.5], 2.0, reason="too small"), "not testable at this scale"),
    ],
)
def test_a_verdict(claim, verdict):
    assert claim.verdict == verdict


def test_a_claim_holds_median_and_spread_over_seeds():
    claim = at_least(*WORDS, [5.0, 1.0, 2.0], 1.5, reason="the second seed diverges")
    assert (claim.measured, claim.spread, claim.seeds, claim.expected) == (2.0, 4.0, 3, ">= 1.5")
    assert claim.reason == "the second seed diverges"
    assert at_least(*WORDS, [5.0], 1.5, reason="unused").reason == ""
    assert math.isnan(at_least(*WORDS, [5.0, math.inf], 1.5).measured)


def test_by_seed_keeps_the_order_of_seeds():
    frame = pd.DataFrame({"seed": [1, 0, 1, 0], "x": [4.0, 1.0, 6.0, 3.0]})
    assert by_seed(frame, lambda part: part["x"].mean()) == [2.0, 5.0]
