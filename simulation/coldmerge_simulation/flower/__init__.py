"""Flower and coldmerge within each other: its strategies in our rounds, our merging in its loop."""
