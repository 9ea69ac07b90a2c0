"""The main job: `tokalign quickstart` as a file.

python scripts/quickstart.py --config recipes/ledger/quickstart.yaml
"""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["quickstart", *sys.argv[1:]])
