"""What is to be run: study files, their plans, cells, costs and searches."""
