"""``python -m lite_detr`` is the console program ``lite-detr``."""

import sys

from lite_detr.commands import main

if __name__ == "__main__":
    sys.argv[0] = "lite-detr"
    sys.exit(main())
