"""`tokalign evaluate answers` as a file of the clone, for `accelerate launch scripts/evaluate.py …`."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["evaluate", "answers", *sys.argv[1:]])
