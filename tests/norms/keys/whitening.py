"""Recorded numbers of normscope.norms.families.whitening."""

KEYS = ()

ONCE = ()
