"""Recorded numbers of normscope.norms.families.populations."""

KEYS = ()

ONCE = ()
