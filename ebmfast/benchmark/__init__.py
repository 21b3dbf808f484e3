"""Timing against other libraries: every variant is checked before it is timed, and all take turns in one process."""
