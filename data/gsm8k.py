"""Build GSM8K as problems: `tokalign data gsm8k` with the same options, for a clone."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["data", "gsm8k", *sys.argv[1:]])
