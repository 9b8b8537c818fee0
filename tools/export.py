#!/usr/bin/env python
"""Export a trained detector and check its file: ``lite-detr export`` in a checkout."""

import sys

from lite_detr.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
