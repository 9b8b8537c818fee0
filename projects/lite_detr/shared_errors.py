"""Errors of one process that are those of the whole job."""

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import comm


@contextmanager
def raised_in_all(*kinds: type[Exception]) -> Iterator[None]:
    """Raises in all processes what the first one raises, which otherwise they would wait for.

    All processes have to come here; what the others raise stays theirs.

    Args:
        kinds: of the errors. They have to be picklable.
    """
    error = None
    try:
        yield
    except kinds as raised:
        if not comm.is_main_process():
            raise
        error = raised
    error = comm.all_gather(error)[0]
    if error is not None:
        raise error
