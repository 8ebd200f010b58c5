"""What a contribution may weigh, and what looks odd about it. Pure: no clock, disk, network."""
