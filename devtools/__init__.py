"""Tools for developers of the shim and of migrations: controller, simulated agents, fleet, demo. Not in the image."""
