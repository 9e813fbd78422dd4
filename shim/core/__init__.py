"""Pure core: state machines that map events and the time to effects, without any I/O.

Attributes and parameters that end in `_at` are monotonic seconds. Durations end in `_s`.
"""
