"""Recorded numbers of normscope.norms.families.robust."""

KEYS = ()

ONCE = ()
