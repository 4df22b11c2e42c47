"""Which folders are packages, and what is compiled; the rest is in pyproject.toml.

Folders at the root such as configs/ are installed inside `vllm_kvcompress` and never
under their own name: vLLM imports a top-level package called `triton_kernels`, and a
folder of ours that answers to it would shadow the real one. pyproject.toml cannot mix
such a mapping with package discovery, so it is done here.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

PACKAGE = "vllm_kvcompress"
# Only with an __init__.py does an editable install find a mapped folder's data.
MAPPED = [
    folder
    for folder in ("configs", "csrc", "triton_kernels")
    if (Path(__file__).parent / folder / "__init__.py").is_file()
]

# A plain library that ctypes loads: it knows neither Python nor torch, so one build
# serves all versions of both, and without a compiler the install goes on without it.
# It names no OpenMP library: symbols are found in torch's, so threads are torch's.
KERNELS = Extension(
    f"{PACKAGE}._cpu",
    sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
    depends=["csrc/api.h", *sorted(str(path) for path in Path("csrc/cpu").glob("*.h"))],
    extra_compile_args=[
        *("-std=c++17", "-O3", "-g0", "-fopenmp"),
        *("-Wno-psabi", "-Wno-maybe-uninitialized"),  # GCC's own headers
    ],
    language="c++",
    optional=True,
    py_limited_api=True,
)

# Likewise, and only on request: it takes nvcc, which few machines have.
CUDA_KERNELS = Extension(
    f"{PACKAGE}._cuda", ["csrc/cuda/kernels.cu"], optional=True, py_limited_api=True
)
CUDA_WANTED = os.environ.get("KVCOMPRESS_BUILD_CUDA") == "1"
# One machine code serves later GPUs of its first digit; PTX, all that are newer still.
GPU_KINDS = (80, 90, 100)


def compile_cuda(source: str, library: str) -> None:
    """Compile the kernels for all kinds of GPUs that this nvcc knows."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
        kinds = [kind for kind in GPU_KINDS if f"compute_{kind}" in known]
        codes = [f"-gencode=arch=compute_{kind},code=sm_{kind}" for kind in kinds]
        codes.append(f"-gencode=arch=compute_{kinds[-1]},code=compute_{kinds[-1]}")
        # CUDA's runtime goes in, hidden from torch's own.
        plain = ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static"]
        hide = "-Xlinker=--exclude-libs,ALL"
        command = [nvcc, *plain, hide, *codes, "-o", library, source]
        Path(library).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(str(error)) from error


class Build(build_ext):
    """Compiles the kernels for GPUs by nvcc."""

    def build_extension(self, ext: Extension) -> None:
        """Compile one library."""
        if ext is CUDA_KERNELS:
            compile_cuda(ext.sources[0], self.get_ext_fullpath(ext.name))
        else:
            super().build_extension(ext)


setup(
    packages=[
        *find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
        *(f"{PACKAGE}.{folder}" for folder in MAPPED),
    ],
    package_dir={f"{PACKAGE}.{folder}": folder for folder in MAPPED},
    ext_modules=[KERNELS, CUDA_KERNELS] if CUDA_WANTED else [KERNELS],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
