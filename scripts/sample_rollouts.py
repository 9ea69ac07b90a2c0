"""`tokalign sample` as a file of the clone, for `accelerate launch scripts/sample_rollouts.py …`."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
