"""Build GSM8K as structured problems: `tokalign data gsm8k-json` with the same options, for a clone."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["data", "gsm8k-json", *sys.argv[1:]])
