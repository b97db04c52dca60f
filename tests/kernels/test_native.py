"""The float kernels as compiled for other processors, and under sanitizers."""

import subprocess
from pathlib import Path

import pytest

from oxjax.kernels import native

CPU = Path(native.__file__).parent / "cpu"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.kernels() is None, reason=native.describe()),
]


def checksum(tmp_path, name, *flags):
    """Of all bits that the kernels give for `check_float_kernels.cpp`, compiled with these flags."""
    sources = [Path(__file__).parent / "check_float_kernels.cpp", *sorted(CPU.glob("[fpr]*.cpp"))]
    sources.remove(CPU / "ffi.cpp")
    made = tmp_path / name
    command = ["c++", "-std=c++17", "-w", "-ffp-contract=off", *flags, f"-I{CPU}", *map(str, sources), "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return subprocess.run([made], capture_output=True, text=True, check=True).stdout


def test_bits_do_not_depend_on_the_processor_and_nothing_is_read_beyond_its_end(tmp_path):
    sanitizers = ("-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    expected = checksum(tmp_path, "sanitized", *sanitizers)
    for name, flags in {
        "native": ("-O3", "-march=native"),
        "avx2": ("-O3", "-mavx2", "-mfma", "-mf16c"),
        "generic": ("-O2",),
    }.items():
        assert checksum(tmp_path, name, *flags) == expected, name
