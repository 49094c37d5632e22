"""Recorded numbers, one module for each family; each is a literal table."""

from tests.norms.keys import (
    areas,
    domain,
    graph,
    mixtures,
    modern,
    operations,
    populations,
    recoveries,
    robust,
    whitening,
)

KEYS = (
    *areas.KEYS,
    *operations.KEYS,
    *whitening.KEYS,
    *recoveries.KEYS,
    *mixtures.KEYS,
    *robust.KEYS,
    *domain.KEYS,
    *graph.KEYS,
    *populations.KEYS,
    *modern.KEYS,
)

ONCE = (
    *areas.ONCE,
    *operations.ONCE,
    *whitening.ONCE,
    *recoveries.ONCE,
    *mixtures.ONCE,
    *robust.ONCE,
    *domain.ONCE,
    *graph.ONCE,
    *populations.ONCE,
    *modern.ONCE,
)
