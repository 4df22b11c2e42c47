"""Which folders are packages, and what is compiled; the rest is in pyproject.toml.

Folders at the root such as configs/ are installed inside `vllm_kvcompress` and never
under their own name: vLLM imports a top-level package called `triton_kernels`, and a
folder of ours that answers to it would shadow the real one. pyproject.toml cannot mix
such a mapping with package discovery, so it is done here.
"""

from pathlib import Path

from setuptools import Extension, find_packages, setup

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
    depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
    extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-Wno-psabi", "-g0"],
    language="c++",
    optional=True,
    py_limited_api=True,
)

setup(
    packages=[
        *find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
        *(f"{PACKAGE}.{folder}" for folder in MAPPED),
    ],
    package_dir={f"{PACKAGE}.{folder}": folder for folder in MAPPED},
    ext_modules=[KERNELS],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
