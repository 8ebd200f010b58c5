"""The coordinator's side of a simulation: the ServerApp, and the real coordinator within it."""
