"""The command `campaign-stats`, also as `python -m consumer`."""

import os
import signal
import sys


def main() -> None:
    """Load the commands and run one."""
    stop_is_no_failure()
    from consumer.cli import main as command

    command()


def stop_is_no_failure() -> None:
    """Until the service listens for signals itself: `run` has done nothing yet, so it ends with 0.

    As process 1 of a container it would not end at all: there the system ignores signals that nobody handles.
    """
    if sys.argv[1:2] == ["run"]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os._exit(0))


if __name__ == "__main__":
    main()
