"""Build step-labelled solutions: `tokalign data step-labels` with the same options, for a clone."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["data", "step-labels", *sys.argv[1:]])
