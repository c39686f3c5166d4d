"""Whole jobs, assembled from the parts: train, eval, demo, and the making of base models."""
