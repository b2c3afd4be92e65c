"""What to run: study files, their plans, cells, costs and searches."""
