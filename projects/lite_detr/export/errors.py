"""What goes wrong in an export, and what to do about it."""


class ExportError(RuntimeError):
    """A detector that a format cannot hold, or a package or compiler that is missing."""
