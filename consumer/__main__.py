"""`python -m consumer` is the command `campaign-stats`."""

from consumer.cli import main

if __name__ == "__main__":
    main()
