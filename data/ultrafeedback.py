"""Build UltraFeedback's prompts as problems: `tokalign data ultrafeedback` with the same options, for a clone."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["data", "ultrafeedback", *sys.argv[1:]])
