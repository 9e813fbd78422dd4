"""Measures the shim against the plainest thing that does the same; `python -m bench` (`make bench`) runs it all."""
