"""Exit codes of the command line; 0 means success."""

FAILURE, USAGE, OUT_OF_TIME, INTERRUPTED = 1, 2, 3, 130
