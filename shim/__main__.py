"""`python -m shim` is the command `agent-shim`."""

from shim.cli import main

main()
