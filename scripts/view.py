"""`tokalign view` as a file of the clone, for `accelerate launch scripts/view.py …`."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["view", *sys.argv[1:]])
