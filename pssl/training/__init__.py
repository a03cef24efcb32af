"""Trainings: of CAM networks, of affinities, of segmentation networks, and the loop that runs them."""
