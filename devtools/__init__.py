"""Tools for developers of the shim and of migrations: a controller, simulated agents, a fleet and a demo."""
