"""What a detector costs, and where it looks."""
