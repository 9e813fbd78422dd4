"""The configuration: settings, where they are read from, the rules between them."""
