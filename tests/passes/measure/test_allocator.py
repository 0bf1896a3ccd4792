"""Memory that is kept for the next tensors, counted in pages that the kernel had to give."""

import os
import platform
import subprocess
import sys

import pytest

from fmpq_fx.passes.measure import allocator

PROGRAM = """
import importlib.util
import resource
import sys
import torch

spec = importlib.util.spec_from_file_location("allocator", sys.argv[1])  # without all that the package imports
allocator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(allocator)

def print_pages(mebibytes):
    "Print how many pages thirty tensors took, one after the other, and how many one has."
    x = torch.ones(mebibytes * 2**18)
    for _ in range(5):
        x + 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        x + 1
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, x.nbytes // resource.getpagesize())

with allocator.freed_memory_kept():
    pass
print_pages(8)
with allocator.freed_memory_kept():
    with allocator.freed_memory_kept():
        pass
    print_pages(30)
print_pages(8)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told anything")
def test_freed_memory_is_used_again_within_the_block_and_in_the_callers_code_after_it() -> None:
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", PROGRAM, allocator.__file__]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for line in found.stdout.splitlines():
        taken, of_one_tensor = map(int, line.split())
        # Without memory that is kept it is thirty times as many. Some kernels take pages back meanwhile.
        assert taken <= 10 * of_one_tensor, f"thirty tensors took {taken} new pages, one has {of_one_tensor}"
