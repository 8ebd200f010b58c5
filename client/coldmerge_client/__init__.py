"""What runs at a contributor: keys, releases, training, the outbox. No terminal in here."""
