"""The pure core: state machines that take events and the time, and return effects. Nothing here performs anything."""
