"""Probes: from a living model to the states and rows of a record. `hooks` is the only file that registers one."""
