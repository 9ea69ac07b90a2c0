"""Build SVAMP as problems: `tokalign data svamp` with the same options, for a clone."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["data", "svamp", *sys.argv[1:]])
