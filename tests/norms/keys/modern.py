"""Recorded numbers of normscope.norms.families.modern."""

KEYS = ()

ONCE = ()
