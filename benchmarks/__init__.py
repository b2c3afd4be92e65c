"""Data, tasks, models, runs, and the one loop that trains them."""
