"""Backbones, their weights, and the CAM network."""
