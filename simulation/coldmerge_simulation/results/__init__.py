"""What many runs came to: sweeps, and runs side by side."""
