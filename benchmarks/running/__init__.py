"""Carrying out runs: one on disk, many on this machine or a Ray cluster."""
