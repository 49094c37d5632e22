"""Recorded numbers of normscope.norms.families.domain."""

KEYS = ()

ONCE = ()
