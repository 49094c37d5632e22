"""Recorded numbers of normscope.norms.families.mixtures."""

KEYS = ()

ONCE = ()
