"""Run the tests of the C++ kernels under ASan and UBSan (`make sanitize`).

The library is compiled with both into build/sanitize and loaded in place of the
installed one.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "build" / "sanitize" / "_cpu.so"
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
]


def main() -> int:
    """Compile, then run the tests with the sanitizer's library loaded first."""
    compiler = os.environ.get("CXX", "g++")
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([compiler, *FLAGS, *sources, "-o", LIBRARY], check=True)
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"],
        check=True,
        text=True,
        capture_output=True,
    ).stdout.strip()
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "VLLM_KVCOMPRESS_CPU_LIBRARY": str(LIBRARY),
    }
    tests = [sys.executable, "-m", "pytest", "-qs", "tests/kernels/test_cpp.py"]
    return subprocess.run(tests, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
