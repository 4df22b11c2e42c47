"""Which folders are packages; everything else about the build is in pyproject.toml.

Folders at the root such as configs/ are installed inside `vllm_kvcompress` and never
under their own name: vLLM imports a top-level package called `triton_kernels`, and a
folder of ours that answers to it would shadow the real one. pyproject.toml cannot mix
such a mapping with package discovery, so it is done here.
"""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "vllm_kvcompress"
# Only with an __init__.py does an editable install find a mapped folder's data.
MAPPED = [
    folder
    for folder in ("configs", "csrc", "triton_kernels")
    if (Path(__file__).parent / folder / "__init__.py").is_file()
]

setup(
    packages=[
        *find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
        *(f"{PACKAGE}.{folder}" for folder in MAPPED),
    ],
    package_dir={f"{PACKAGE}.{folder}": folder for folder in MAPPED},
)
