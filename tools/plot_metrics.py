#!/usr/bin/env python
"""Draw the course of a training run: ``lite-detr plot-metrics`` in a checkout."""

import sys

from lite_detr.commands.plot_metrics import main

if __name__ == "__main__":
    sys.exit(main())
