"""``python -m benchmarks`` is ``augbench``."""

from augbench import main

if __name__ == "__main__":
    main()
