"""Pure wire formats: the legacy HTTP dialects and the controller's messages."""
