"""Build function calls as structured problems: `tokalign data bfcl` with the same options, for a clone."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["data", "bfcl", *sys.argv[1:]])
