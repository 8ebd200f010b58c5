"""The contributors' side of a simulation: the ClientApp, and how contributors behave."""
