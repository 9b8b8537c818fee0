"""What training needs besides Detectron2: hooks, and how its processes come together."""
