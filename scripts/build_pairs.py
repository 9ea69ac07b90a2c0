"""`tokalign pairs` as a file of the clone, for `accelerate launch scripts/build_pairs.py …`."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["pairs", *sys.argv[1:]])
