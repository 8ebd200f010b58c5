"""The demo: a real coordinator and real contributors on this machine, measured as they go."""
