"""`tokalign evaluate structured` as a file of the clone, for `accelerate launch scripts/evaluate_structured.py …`."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["evaluate", "structured", *sys.argv[1:]])
