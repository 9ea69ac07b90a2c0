"""Build made-up recipes as structured problems: `tokalign data cooking` with the same options, for a clone."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["data", "cooking", *sys.argv[1:]])
