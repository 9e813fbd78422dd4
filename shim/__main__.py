"""`python -m shim` is the command `agent-shim`."""

from shim.cli.main import main

main()
