#!/usr/bin/env python
"""Train or evaluate a detector: ``lite-detr train`` in a checkout."""

import sys

from lite_detr.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
