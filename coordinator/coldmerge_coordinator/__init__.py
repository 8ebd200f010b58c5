"""What runs at the coordinator: services, store, driver and merge worker. No terminal."""
