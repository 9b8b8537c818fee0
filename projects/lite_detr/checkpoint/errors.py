"""The errors that all parts of this package raise."""


class WeightsError(ValueError):
    """Weights cannot be read or do not fit the model."""


class SaveError(OSError):
    """A checkpoint cannot be written."""
