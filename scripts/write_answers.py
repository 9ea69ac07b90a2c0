"""`tokalign write-answers` as a file of the clone, for `accelerate launch scripts/write_answers.py …`."""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["write-answers", *sys.argv[1:]])
