"""Recorded numbers of normscope.norms.families.graph."""

KEYS = ()

ONCE = ()
