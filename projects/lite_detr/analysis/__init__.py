"""Count the cost of a detector, and show where it looks."""
