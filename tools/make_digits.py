#!/usr/bin/env python
"""Make the dataset of digits: ``lite-detr make-digits`` in a checkout."""

import sys

from lite_detr.commands.make_digits import main

if __name__ == "__main__":
    sys.exit(main())
