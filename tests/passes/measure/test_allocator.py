"""Memory that is kept for the next tensors, counted in pages that the kernel had to give."""

import os
import platform
import subprocess
import sys

import pytest

from fmpq_fx.passes.measure import allocator

PROGRAM = """
import resource
import runpy
import sys
import torch

freed_memory_kept = runpy.run_path(sys.argv[1])["freed_memory_kept"]  # without all that the package imports

def print_pages(mebibytes):
    "Print how many pages thirty tensors took, one after the other, and how many one has."
    x = torch.ones(mebibytes * 2**18)
    for _ in range(5):
        x + 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        x + 1
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, x.nbytes // resource.getpagesize())

with freed_memory_kept():
    pass
print_pages(8)
with freed_memory_kept():
    with freed_memory_kept():
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
        assert taken <= of_one_tensor, f"thirty tensors took {taken} new pages, and one has {of_one_tensor}"
