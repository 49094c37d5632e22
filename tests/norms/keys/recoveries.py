"""Recorded numbers of normscope.norms.families.recoveries."""

KEYS = ()

ONCE = ()
