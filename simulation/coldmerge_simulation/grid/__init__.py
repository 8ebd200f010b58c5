"""Flower over coldmerge's wire: a stock ServerApp drives a served coordinator's contributors."""
