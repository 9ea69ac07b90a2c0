"""`tokalign own-data` as a file of the clone; `make own-data SOURCE=…` runs it with SmolLM2."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["own-data", *sys.argv[1:]])
