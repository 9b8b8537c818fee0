"""What can go wrong when a detector is optimized."""


class OptimizationError(RuntimeError):
    """A detector cannot be optimized as asked for: the message says what to do."""
