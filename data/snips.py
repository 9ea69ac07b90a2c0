"""Build SNIPS as structured problems: `tokalign data snips` with the same options, for a clone."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["data", "snips", *sys.argv[1:]])
