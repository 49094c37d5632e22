"""Probes: from a living model to the states and rows of a record. `hooks` is the only file that registers one."""

VERSION = 1  # of what probes measure: raised when a number in a record comes to mean something else
