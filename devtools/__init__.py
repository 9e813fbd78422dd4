"""Tools for developers of the shim and of migrations: a controller, simulated agents, a fleet, the demo. Not in the image."""
