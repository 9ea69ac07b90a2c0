"""`tokalign reward` as a file of the clone, for `accelerate launch scripts/score_rewards.py …`."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["reward", *sys.argv[1:]])
