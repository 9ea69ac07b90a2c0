"""Build the ledger world: `tokalign data ledger` with the same options, for a clone."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["data", "ledger", *sys.argv[1:]])
