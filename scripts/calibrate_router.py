"""A router's threshold for a budget; the same as `tokalign calibrate`.

python scripts/calibrate_router.py --router runs/router --dataset runs/labels/labels/calibration --target_rate 0.12
"""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["calibrate", *sys.argv[1:]])
