"""Entry point of `python -m shim`, the same as the command `agent-shim`."""

from shim.cli.main import main

main()
