"""Configuration: the settings, their sources, and the rules between them."""
