"""What a round is: its policy, its states, its gate. Pure: no clock, no disk, no network."""
