"""The researcher's side: a federation of simulated contributors, driven through Flower."""
