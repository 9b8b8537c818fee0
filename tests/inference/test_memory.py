"""Freed memory that the process keeps."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lite_detr.inference import keep_freed_memory, memory

# How many pages the kernel hands out for ten blocks of 40 MiB, before and after. The file alone is
# imported, which is sooner done.
FAULTS = f"""
import importlib.util, resource, torch

spec = importlib.util.spec_from_file_location("memory", {memory.__file__!r})
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)

def faults(blocks):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(blocks):
        torch.empty(10 * 2**20).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(10))
assert memory.keep_freed_memory()
faults(20)  # The heap grows until it has a free block of this size.
print(faults(10))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_blocks_are_used_again():
    command = [sys.executable, "-c", FAULTS]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, after = map(int, output.split())
    assert before > 10 * 1000 and after < 100


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert not keep_freed_memory()
