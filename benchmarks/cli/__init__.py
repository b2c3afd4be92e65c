"""The command line, ``augbench``: a file a verb."""
