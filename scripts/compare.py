"""How well token signals find the critical token: `tokalign compare` as a file."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
