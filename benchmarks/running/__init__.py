"""Execution of runs: one on disk, many on this machine or on a Ray cluster."""
