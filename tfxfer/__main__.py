"""`python -m tfxfer`: the command line."""

from tfxfer.cli import main

if __name__ == "__main__":
    main()
