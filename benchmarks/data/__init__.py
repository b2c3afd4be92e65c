"""Data sets by name, and the rows of them that a run sees."""
