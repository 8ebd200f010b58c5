"""The wire: channels, calls, errors and the generated `coldmerge.v1` stubs."""
