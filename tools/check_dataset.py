#!/usr/bin/env python
"""Report everything that is wrong with a dataset: ``lite-detr check-data`` in a checkout."""

import sys

from lite_detr.commands.check_data import main

if __name__ == "__main__":
    sys.exit(main())
