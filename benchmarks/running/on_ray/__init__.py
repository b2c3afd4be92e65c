"""The executor on Ray: the only modules that import it."""
