"""Clusters: their profiles, what of a sweep is submitted to them, and the job that trains it there."""
