"""Damaged and hostile files of weights: one line each, and never another value than was written.

The short run takes part of the cases; ``make test-all`` takes all.
"""

import argparse
import datetime
import io
import json
import pathlib
import pickle
import random
import struct
import threading
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from fuzzing import damaged

from lite_detr.checkpoint import DetrCheckpointer, SaveError, WeightsError
from lite_detr.checkpoint.files import read_torch, read_weights
from lite_detr.checkpoint.pickles import TensorUnpickler

WEIGHTS = {"decoder.weight": torch.arange(12.0).view(3, 4), "decoder.bias": torch.arange(3.0)}


class Detector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Linear(4, 3)


def load(path):
    """Load a file as programs do; return the weights that came of it."""
    model = Detector()
    DetrCheckpointer(model, fine_tune=True).load(str(path))
    return model.state_dict()


def check(path):
    """Load a file.

    Raises:
        WeightsError: it is refused, in one line that names it.
        AssertionError: other values were read than those written.
    """
    try:
        found = load(path)
    except WeightsError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        assert path.name in str(error)
        raise
    for name, value in WEIGHTS.items():
        assert torch.equal(found[name], value), name


def outcome(path):
    """Return ``read`` or ``refused``; fail on another error, or on other values."""
    try:
        check(path)
    except WeightsError:
        return "refused"
    return "read"


def save_zip(content, path):
    torch.save(content, path)


def save_old(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(content, path):
    arrays = {name: value.numpy() for name, value in content["model"].items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, 2))


def save_safetensors(content, path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(content["model"], path)


# Where no checksum tells of a damage, data are left alone: (name, save, bytes that may change).
FORMATS = {
    "zip": ("a.pth", save_zip, None),
    "old": ("b.pth", save_old, lambda raw: raw.index(b"model")),
    "pickle": ("a.pkl", save_pickle, lambda raw: raw.index(b"decoder")),
    "safetensors": ("a.safetensors", save_safetensors, lambda raw: 8),
}


def damaged_files(kind, count, path):
    """Yield the bytes of a file, damaged in ``count`` ways."""
    _, save, safe = FORMATS[kind]
    save({"model": WEIGHTS, "epoch": 3}, path)
    raw, rng = path.read_bytes(), random.Random(0)
    assert outcome(path) == "read"
    for _ in range(count):
        yield damaged(raw, rng, None if safe is None else safe(raw))


@pytest.mark.parametrize("count", [150, pytest.param(8000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_refused_or_read_as_it_was(fuzz, kind, count, tmp_path):
    path = tmp_path / FORMATS[kind][0]

    def attempt(raw):
        path.write_bytes(raw)
        check(path)

    outcomes = fuzz(f"weights, {kind}", damaged_files(kind, count, path), attempt)
    assert outcomes["refused"] > count // 3


def headers(raw):
    """Return the places of the bytes of a zip file that are neither data nor padding."""
    places = []
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        for info in archive.infolist():
            places += range(info.header_offset, info.header_offset + 30 + len(info.filename))
        places += range(archive.start_dir, len(raw))
    return places


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_bits_of_headers_and_the_directory(fuzz, step, tmp_path):
    path = tmp_path / "a.pth"
    save_zip({"model": WEIGHTS, "epoch": 3}, path)
    raw = path.read_bytes()

    def attempt(flip):
        place, bit = flip
        changed = bytearray(raw)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        check(path)

    flips = [(place, bit) for place in headers(raw)[::step] for bit in range(8)]
    assert fuzz("weights, bits of headers", flips, attempt)["refused"] > 100


class Call:
    """Pickles as a call of anything, with a state."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def object_type():
    """NumPy's type of objects, whose flags the file clears: it followed pointers of a file's."""
    return Call(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 0))


def nested(depth, kind):
    value = 0
    for _ in range(depth):
        value = [value] if kind is list else (value, value)
    return value


def cyclic():
    value = []
    value.append(value)
    return value


_reconstruct = np.zeros(1).__reduce__()[0]
_scalar = np.float64(1).__reduce__()[0]
EIGHT = (0x4141414141414141).to_bytes(8, "little")
HOSTILE_PICKLES = {
    "a scalar of objects": lambda: Call(_scalar, object_type(), EIGHT),
    "an array of objects": lambda: Call(
        _reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), object_type(), False, EIGHT)
    ),
    "a structured type": lambda: np.zeros(2, dtype=[("a", "f4"), ("b", "O")]),
    "numpy's ndarray called": lambda: Call(np.ndarray, (2,), np.dtype("f4")),
    "a type with a hostile state": lambda: Call(
        np.dtype, "f8", False, True, state=(3, "<", (np.dtype("f4"), (4,)), None, None, -1, -1, 0)
    ),
    "a shape beyond its bytes": lambda: Call(
        _reconstruct, np.ndarray, (0,), b"b", state=(1, (9, 9), np.dtype("f4"), False, b"abcd")
    ),
    "a negative shape": lambda: Call(
        _reconstruct, np.ndarray, (0,), b"b", state=(1, (-1,), np.dtype("f4"), False, b"abcd")
    ),
    "strings": lambda: np.array(["a", "b"]),
    "objects": lambda: np.array([{}, None], dtype=object),
    "times": lambda: np.array(["2026-01-01"], dtype="datetime64[s]"),
    "an array with itself as its type": lambda: Call(_scalar, 3, EIGHT),
    "deep lists": lambda: nested(300, list),
    "deep tuples": lambda: nested(200, tuple),
    "a list in itself": cyclic,
    "a path": lambda: pathlib.PurePosixPath("/etc/passwd"),
    "a date": lambda: datetime.date(2026, 1, 1),
    "a function": lambda: print,
    "a call of print": lambda: Call(print, "code has run"),
    "getattr": lambda: Call(getattr, "", "join"),
    "a defaultdict of calls": lambda: Call(defaultdict, print),
    "a number": lambda: 3,
    "nothing": lambda: None,
    "a string": lambda: "weights",
}
STRANGE_TENSORS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "without values": lambda: torch.empty(3, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "conjugated": lambda: torch.ones(3, dtype=torch.cfloat).conj(),
    "complex": lambda: torch.ones(3, dtype=torch.cfloat),
}


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "old.pth", "a.pyth"])
@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_pickles_are_one_line_and_nothing_runs(case, name, tmp_path, capfd):
    content = {"model": {"decoder.weight": HOSTILE_PICKLES[case]()}, "model_state": {}}
    content["model_state"] = content["model"]
    path = tmp_path / name
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=name != "old.pth")
    assert outcome(path) == "refused"
    assert "code has run" not in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", STRANGE_TENSORS)
def test_tensors_that_cannot_be_weights(case, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": WEIGHTS | {"decoder.bias": STRANGE_TENSORS[case]()}}, path)
    assert outcome(path) == "refused"


@pytest.mark.parametrize(
    "key", [3, None, b"decoder", ("a", "b"), "two\nlines", "x" * 5000, "\udc80"]
)
def test_keys_that_are_not_names(key, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": WEIGHTS | {key: torch.ones(1)}}, path)
    assert outcome(path) == "refused"


class Storage:
    """Stands for a storage of so many floats in a file's data."""

    def __init__(self, count):
        self.count = count


def tensor_pickle(count, args):
    """The ``data.pkl`` of a tensor whose arguments the file chooses."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 2)
    pickler.persistent_id = lambda value: (
        ("storage", torch.FloatStorage, "0", "cpu", value.count)
        if isinstance(value, Storage)
        else None
    )
    tensor = Call(torch._utils._rebuild_tensor_v2, Storage(count), *args)
    pickler.dump({"model": {"decoder.bias": tensor}})
    return buffer.getvalue()


TENSORS = {
    "larger than its storage": (3, (0, (4,), (1,), False, OrderedDict())),
    "behind its storage": (3, (1, (3,), (1,), False, OrderedDict())),
    "of negative offset": (3, (-1, (3,), (1,), False, OrderedDict())),
    "of negative strides": (3, (2, (3,), (-1,), False, OrderedDict())),
    "of huge strides": (3, (0, (3,), (2**62,), False, OrderedDict())),
    "of huge sizes": (3, (0, (2**40, 2**40), (0, 0), False, OrderedDict())),
    "repeated beyond memory": (3, (0, (2**40,), (0,), False, OrderedDict())),
    "of a storage of another size": (4, (0, (3,), (1,), False, OrderedDict())),
    "of a huge storage": (2**50, (0, (3,), (1,), False, OrderedDict())),
    "of sizes that are no numbers": (3, (0, ("3",), (1,), False, OrderedDict())),
    "of another number of strides": (3, (0, (3,), (1, 1), False, OrderedDict())),
    "of nothing": (3, ()),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_lie_about_their_storage(case, tmp_path):
    """PyTorch gives such a tensor memory that nobody has written."""
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", tensor_pickle(*TENSORS[case]))
        archive.writestr("a/data/0", np.arange(3, dtype=np.float32).tobytes())
    assert outcome(path) == "refused"


def test_archives_that_are_not_pytorchs(tmp_path):
    data = tensor_pickle(3, (0, (3,), (1,), False, OrderedDict()))
    floats = np.arange(3, dtype=np.float32).tobytes()
    cases = [
        dict(entries={"a/data.pkl": data, "a/data/0": floats}, method=zipfile.ZIP_DEFLATED),
        dict(entries={"a/data.pkl": data}),
        dict(entries={"a/data/0": floats}),
        dict(entries={"a/data.pkl": data, "b/data.pkl": data, "a/data/0": floats}),
        dict(entries={"a/data.pkl": data, "a/data/0": floats, "a/byteorder": b"big"}),
        dict(entries={"a/data.pkl": data, "a/data/0": b""}),
        dict(entries={"a/data.pkl": b"", "a/data/0": floats}),
    ]
    for case in cases:
        with zipfile.ZipFile(tmp_path / "a.pth", "w", case.get("method", 0)) as archive:
            for name, content in case["entries"].items():
                archive.writestr(name, content)
        assert outcome(tmp_path / "a.pth") == "refused", case["entries"].keys()


def test_a_pickle_that_copies_one_value_again_and_again_is_refused():
    text = b"x" * 10**6
    call = b"c_codecs\nencode\nq\x01"
    start = (
        b"\x80\x02X" + struct.pack("<I", len(text)) + text + b"q\x00X\x06\x00\x00\x00latin1q\x02"
    )
    again = b"h\x01h\x00h\x02\x86R"
    with pytest.raises(pickle.UnpicklingError, match="too many copies"):
        TensorUnpickler().load(io.BytesIO(start + call + again * 1000 + b"."))


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_opcodes_without_their_arguments(fuzz, count, tmp_path):
    """Random programs."""
    rng, path = random.Random(0), tmp_path / "a.pkl"
    opcodes = (
        b"(.012FIJKMLNRSTUVXabcdeghijloqrstu}]\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8e\x93\x94"
    )
    pickles = (
        b"\x80\x02" + bytes(rng.choice(opcodes) for _ in range(rng.randrange(1, 30))) + b"."
        for _ in range(count)
    )

    def attempt(raw):
        path.write_bytes(raw)
        check(path)

    assert fuzz("weights, random pickles", pickles, attempt)["used"] == 0


SAFETENSORS = {
    "a huge header": struct.pack("<Q", 2**60) + b"{}",
    "no header": struct.pack("<Q", 0),
    "a list": struct.pack("<Q", 2) + b"[]",
    "nested": struct.pack("<Q", 20000) + b"[" * 20000,
    "not UTF-8": struct.pack("<Q", 4) + b"\xff\xfe{}",
}
ENTRIES = {
    "data beyond the end": {"dtype": "F32", "shape": [3], "data_offsets": [0, 1 << 40]},
    "a size that does not fit": {"dtype": "F32", "shape": [2**60, 2**60], "data_offsets": [0, 12]},
    "a negative size": {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]},
    "an unknown type": {"dtype": "O8", "shape": [3], "data_offsets": [0, 12]},
    "strings": {"dtype": "F32", "shape": "3", "data_offsets": [0, 12]},
    "offsets in reverse": {"dtype": "F32", "shape": [3], "data_offsets": [12, 0]},
    "nothing": {},
}


@pytest.mark.parametrize("case", [*SAFETENSORS, *ENTRIES])
def test_hostile_headers_of_safetensors(case, tmp_path):
    pytest.importorskip("safetensors")
    raw = SAFETENSORS.get(case)
    if raw is None:
        header = json.dumps({"decoder.bias": ENTRIES[case]}).encode()
        raw = struct.pack("<Q", len(header)) + header + bytes(12)
    (tmp_path / "a.safetensors").write_bytes(raw)
    assert outcome(tmp_path / "a.safetensors") == "refused"


def same(a, b):
    if isinstance(a, (torch.Tensor, np.ndarray)):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, argparse.Namespace):
        a, b = vars(a), vars(b)
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def all_kinds():
    """Everything that may stand in a checkpoint, and views that share memory."""
    base = torch.arange(24.0).view(4, 6)
    kinds = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16]
    kinds += [torch.bfloat16, torch.float64, torch.bool, torch.cfloat, torch.uint16, torch.uint64]
    kinds += [torch.float8_e4m3fn]
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    return {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "tensors": [torch.ones(3).to(kind) for kind in kinds],
        "views": [base, base.t(), base[1:3, ::2], base[:0], torch.tensor(5), base[0].expand(3, 6)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [1, -(2**80), 0.1, float("inf"), True, None, "text é", b"bytes", 1j, (), {}, []],
        "keys": {1: "a", "b": 2, None: 3, (1, "c"): 4, 1.5: 5},
        "sets": [{1, 2}, frozenset("ab"), set()],
        "counts": Counter("hello"),
        "ordered": OrderedDict(b=1, a=2),
        "default": defaultdict(list, a=[1]),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "type": torch.float32,
        "args": argparse.Namespace(lr=0.1, milestones=[11], nested=argparse.Namespace(a=1)),
    }


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_what_pytorch_reads_is_read_alike(new, tmp_path):
    path = tmp_path / "a.pth"
    content = all_kinds()
    if not new:
        # PyTorch itself does not read its newer types in this format.
        content["tensors"] = content["tensors"][:10]
    torch.save(content, path, _use_new_zipfile_serialization=new)
    expected = torch.load(path, weights_only=False)
    found = read_torch(str(path))
    for key in expected:
        assert same(expected[key], found[key]), key
    # Views share memory, as they did.
    found["views"][0][1, 0] = -1
    assert found["views"][1][0, 1] == found["views"][2][0, 0] == -1


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_numbers_of_all_protocols(protocol, tmp_path):
    arrays = {
        "c": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "empty": np.zeros((0, 3), np.float16),
        "zero": np.array(3, np.int64),
        "bool": np.array([True, False]),
        "scalar": np.float64(41.5),
    }
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(arrays, protocol))
    for name, value in read_weights(str(path)).items():
        assert np.array_equal(value, arrays[name]) and value.shape == arrays[name].shape, name


def test_threads_read_at_the_same_time(tmp_path):
    """PyTorch's list of allowed classes is one for the process, and was changed meanwhile."""
    path = tmp_path / "a.pth"
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=1)}, path)
    failures = []

    def read():
        for _ in range(40):
            try:
                read_torch(str(path))
            except WeightsError as error:
                failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    "value",
    [np.float64(41.5), np.int64(3), np.arange(3), np.float32(1), defaultdict(list), {1, 2}],
)
def test_what_the_checkpointer_saves_it_also_loads(value, tmp_path):
    saved = DetrCheckpointer(Detector(), str(tmp_path))
    saved.save("a", best=value, iteration=3)
    found = DetrCheckpointer(Detector()).load(str(tmp_path / "a.pth"))["best"]
    assert same(value, found)


@pytest.mark.parametrize(
    "value, word",
    [
        (pathlib.Path("a"), "PosixPath"),
        (datetime.datetime(2026, 1, 1), "datetime.datetime"),
        (np.array(["a"]), "<U1"),
        (np.datetime64("2026-01-01"), "datetime64"),
        (print, "builtin_function_or_method"),
        (Detector, "type"),
        (torch.eye(2).to_sparse(), "tensor without plain values"),
        ({datetime.date(2026, 1, 1): 1}, "the key"),
        (nested(100, list), "nested too deeply"),
    ],
)
def test_what_could_not_be_loaded_is_refused_when_it_is_saved(value, word, tmp_path):
    with pytest.raises(SaveError, match=word) as error:
        DetrCheckpointer(Detector(), str(tmp_path)).save("a", history=[{"best": value}])
    assert "history.0" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_checkpointer_loads_again_after_a_broken_file(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"broken")
    checkpointer = DetrCheckpointer(Detector())
    with pytest.raises(WeightsError):
        checkpointer.load(str(tmp_path / "b.pth"))
    checkpointer.load(str(tmp_path / "a.pth"))


def test_weights_of_a_larger_detector_are_not_loaded_in_part(tmp_path):
    torch.save({"model": WEIGHTS | {"decoder.more.weight": torch.ones(2)}}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="no place for 1 of them, such as decoder.more.weight"):
        load(tmp_path / "a.pth")


def prefixed(prefix, value=0.0):
    return {f"{prefix}{name}": weight + value for name, weight in WEIGHTS.items()}


@pytest.mark.parametrize(
    "content, added",
    [
        ({"state_dict": prefixed("")}, 0),
        ({"model": prefixed("model."), "epoch": 3}, 0),
        ({"model": {"state_dict": prefixed("module.")}}, 0),
        ({"state_dict": prefixed("module._orig_mod.model.")}, 0),
        ({"ema": prefixed("", 1), "model": prefixed("")}, 1),
        ({"model_ema": prefixed("module.", 1), "state_dict": prefixed("")}, 1),
        ({"ema_state": {"module": prefixed("", 1)}, "model": prefixed("")}, 1),
        ({"params_ema": prefixed("", 1), "params": prefixed("")}, 1),
        ({"ema": {"n_averaged": torch.tensor(3)} | prefixed("module.", 1)}, 1),
        # Of a training of Detectron2 or ours, which has the average beside its weights.
        ({"model": prefixed(""), "ema": prefixed("module.", 1), "iteration": 7}, 0),
    ],
)
def test_weights_below_other_names_are_found_and_an_average_is_preferred(
    content, added, tmp_path, caplog
):
    torch.save(content, tmp_path / "a.pth")
    with caplog.at_level("INFO", "lite_detr"):
        assert torch.equal(
            load(tmp_path / "a.pth")["decoder.bias"], WEIGHTS["decoder.bias"] + added
        )
    assert ("moving average" in caplog.text) == bool(added)


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, {"model": {"deeper": {"x": 1}}}, [1], None])
def test_files_without_weights_name_what_they_hold(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    assert outcome(tmp_path / "a.pth") == "refused"


def test_a_file_that_is_not_regular_is_named(tmp_path):
    for path in (tmp_path, pathlib.Path("/dev/zero")):
        with pytest.raises(FileNotFoundError, match="it is not a file"):
            load(path)
