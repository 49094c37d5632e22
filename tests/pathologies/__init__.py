"""Real training runs with known defects, and healthy ones: what the diagnostics are held against."""

from tests.pathologies import broken, healthy
from tests.pathologies.spikes import CALM, SPIKES

BROKEN = broken.BROKEN + SPIKES
HEALTHY = healthy.HEALTHY + CALM
CASES = BROKEN + HEALTHY
