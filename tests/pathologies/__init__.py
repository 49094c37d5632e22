"""Real training runs with known defects, and healthy ones: what the diagnostics are held against."""

from tests.pathologies.broken import BROKEN
from tests.pathologies.healthy import HEALTHY

CASES = BROKEN + HEALTHY
