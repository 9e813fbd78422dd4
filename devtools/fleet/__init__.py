"""Many simulated agents at once, with a latency report."""
