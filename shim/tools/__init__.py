"""Commands for people: a development controller, simulated agents, a demonstration. Nothing that `run` needs."""
