"""Scores of CAMs and label images, the threshold chosen by them, and results as files and tables."""
