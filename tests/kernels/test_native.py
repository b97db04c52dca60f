"""The kernels as compiled for other processors, and under sanitizers."""

import subprocess
from pathlib import Path

import pytest

from oxjax.kernels import native

CPU = Path(native.__file__).parent / "cpu"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.kernels() is None, reason=native.describe()),
]


def checksum(program, tmp_path, name, *flags):
    """Of all bits that the kernels give in a program, compiled with these flags."""
    sources = [Path(__file__).parent / program, *sorted(set(CPU.glob("*.cpp")) - set(CPU.glob("ffi*")))]
    made = tmp_path / name
    command = ["c++", "-std=c++17", "-w", "-ffp-contract=off", *flags, f"-I{CPU}", *map(str, sources), "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return subprocess.run([made], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("program", ["check_float_kernels.cpp", "check_quantized_matmul.cpp"])
def test_bits_do_not_depend_on_the_processor_and_nothing_is_read_beyond_its_end(program, tmp_path):
    sanitizers = ("-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    expected = checksum(program, tmp_path, "sanitized", *sanitizers)
    builds = {"native": ("-O3", "-march=native"), "generic": ("-O2",)}
    if native.kernels() != "generic":
        builds["avx2"] = ("-O3", "-mavx2", "-mfma", "-mf16c")
    if native.kernels().startswith("AVX-512"):
        builds["avx512"] = ("-O3", "-march=skylake-avx512")
    for name, flags in builds.items():
        assert checksum(program, tmp_path, name, *flags) == expected, name
