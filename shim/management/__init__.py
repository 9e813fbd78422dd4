"""Management of a running shim without HTTP: its status as data, and the operators' actions."""
