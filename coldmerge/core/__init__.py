"""Checkpoints, task vectors, signed documents, errors: everything else stands on these."""
