"""Exit codes of the command line; 0 where all went well."""

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
