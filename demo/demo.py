#!/usr/bin/env python
"""Detect objects in images and videos: ``lite-detr predict`` in a checkout."""

import sys

from lite_detr.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
