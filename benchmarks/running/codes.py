"""Exit codes of the command line; 0 means success."""

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
