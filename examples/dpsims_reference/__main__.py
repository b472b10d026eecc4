"""``python -m dpsims_reference``."""

from dpsims_reference.cli import main

if __name__ == "__main__":
    main()
