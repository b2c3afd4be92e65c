"""The page on a folder of runs: tables, sentences, figures."""
