"""Build MATH as problems: `tokalign data math` with the same options, for a clone."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["data", "math", *sys.argv[1:]])
