"""Probes: from a living model to the states and rows that a record keeps. `hooks` is the only file that registers one."""
