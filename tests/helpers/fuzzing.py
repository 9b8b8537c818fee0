"""Damaged and hostile inputs by the thousand, counted and reported in one way.

A test gets a :class:`Fuzzer` by the fixture ``fuzz``. What all of them counted stands at the end of
pytest's output.
"""

import contextlib
import copy
import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from lite_detr.errors import LiteDetrError

# Stand in for a value of a JSON file.
HOSTILE_VALUES = [
    *(
        None,
        True,
        0,
        -1,
        1,
        2**31,
        2**63,
        -(2**63) - 1,
        10**400,
        0.5,
        -0.0,
        1e-300,
        1e308,
        float("nan"),
    ),
    *(
        float("inf"),
        float("-inf"),
        "",
        "x",
        "1",
        "\0",
        "\ud800",
        "a\nb",
        "../../etc/passwd",
        "/dev/zero",
        "a.jpg",
    ),
    *("$x^2$", "%s", "\u202eabc", "\N{GRINNING FACE}", "9" * 5000, "a" * 5000),
    *([], [[]], [None], [[[[]]]], {}, {"id": 1}, [1, 2, 3, 4], [[1, 2, 3, 4]]),
    *([[1, 1, 9, 1, 9, 9]], {"size": [80, 100], "counts": "Pj7"}, {"size": "80", "counts": [8000]}),
    *({"size": [80, 100], "counts": "\u00e9"}, {"size": [80, 100], "counts": [-1, 8001]}),
]


class Hang(BaseException):
    """An attempt took too long. Not an ``Exception``, so that no code under test catches it."""


class Fuzzer:
    """Tries many inputs and counts what becomes of them.

    Args:
        report: called with a line of counts.
    """

    def __init__(self, report: Callable[[str], None]):
        self.report = report

    def __call__(
        self,
        subject: str,
        inputs: Iterable[object],
        attempt: Callable[[object], object],
        seconds: float = 20.0,
    ) -> Counter:
        """Try each input, report the counts and fail if one is a fault.

        Args:
            subject: what is tried, for the report.
            inputs: anything whose ``repr`` tells a reader what it was.
            attempt: called with an input. It returns if the input is used, raises a
                `LiteDetrError` of one line if it is refused, and an `AssertionError` if the result
                is wrong.
            seconds: after which an attempt counts as hanging.

        Returns:
            How often an input was ``used`` and ``refused``.
        """
        outcomes, faults = Counter(), []
        for number, value in enumerate(inputs):
            outcome, reason = _outcome(attempt, value, seconds)
            outcomes[outcome] += 1
            if reason:
                faults.append(f"input {number}, {outcome}: {reason}\n  {value!r:.500}")
        total = outcomes.total()
        assert total, "there are no inputs"
        line = (
            f"{subject}: {total:,} inputs ({outcomes['used']:,} used, {outcomes['refused']:,} "
            f"refused), {outcomes['traceback']} tracebacks, {outcomes['hang']} hangs, "
            f"{outcomes['wrong answer']} wrong answers"
        )
        self.report(line)
        assert not faults, "\n".join([line, *faults[:10]])
        return outcomes


def _outcome(attempt: Callable[[object], object], value: object, seconds: float) -> tuple[str, str]:
    try:
        with _time_limit(seconds):
            attempt(value)
    except LiteDetrError as error:
        if "\n" in str(error):
            return "traceback", f"a message of several lines: {error}"
        return "refused", ""
    except Hang:
        return "hang", f"no end after {seconds} s"
    except AssertionError as error:
        return "wrong answer", str(error) or "an assertion failed"
    # What a user would see as a traceback; it is what this looks for.
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return "used", ""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_):
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def damaged(raw: bytes, rng: random.Random, end: int | None = None) -> bytes:
    """Return the bytes of a file with some bits flipped, a part zeroed or repeated, or cut off.

    Args:
        raw: the file.
        rng: draws the damage.
        end: bytes from there on are left alone, or cut off.
    """
    changed, limit = bytearray(raw), len(raw) if end is None else end
    start = rng.randrange(limit)
    stop = min(limit, start + rng.randrange(1, 64))
    match rng.randrange(6):
        case 0:
            del changed[rng.randrange(len(raw)) :]
        case 1:
            changed[start:stop] = bytes(stop - start)
        case 2 if end is None:
            changed[start:start] = changed[start:stop]
        case _:
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(limit)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def distorted(content: object, rng: random.Random) -> object:
    """Return a copy of a JSON value, in which up to three values are hostile, gone or repeated."""
    changed = json.loads(json.dumps(content))
    for _ in range(rng.randrange(1, 4)):
        places = list(_places(changed))
        if not places:
            return copy.deepcopy(rng.choice(HOSTILE_VALUES))
        owner, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del owner[key]
            case 1 if isinstance(owner, list):
                owner.append(owner[key])
            case _:
                owner[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
    return changed


def _places(value: object) -> Iterator[tuple[dict | list, object]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
