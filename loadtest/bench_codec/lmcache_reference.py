"""LMCache's own CacheGen, run in an environment of its own and asked through files.

Covers: both sides: `round_trip` here, and the script that LMCache's interpreter runs (this file, as a program).
Does not cover: the scheme of the paper (`kvstore.codecs.cachegen`), from which LMCache's differs: no anchors, no tables
from before, a pickle per chunk.

LMCache pins versions that this project does not have, so it is never imported here. `LEARNONCE_LMCACHE_PYTHON` names
the interpreter of an environment that has it. One that borrows this one's torch and transformers is made without pip
resolving anything:

    python -m venv --without-pip lmcache-env
    there=lmcache-env/lib/python3.11/site-packages
    python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $there/base.pth
    pip install --no-deps --target $there lmcache==0.5.6 aiofile caio
    export LEARNONCE_LMCACHE_PYTHON=$PWD/lmcache-env/bin/python
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file

PYTHON_VARIABLE: Final = "LEARNONCE_LMCACHE_PYTHON"
CHUNK_TOKENS: Final = 256
"""LMCache's default; its tables are made, and stored, for every chunk."""
_FACTS: Final = "facts"


class LmcacheUnusableError(Exception):
    """LMCache cannot run here; the message says why, for the result file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LmcacheResult:
    """One tensor's way through LMCache."""

    kv_L2TNH: torch.Tensor
    """What its reader gets."""
    num_bytes: int
    """Of all its chunks, as LMCache hands them to its store."""
    encode_s: float
    decode_s: float
    lmcache_version: str


def round_trip(
    tensors: Mapping[str, torch.Tensor],
    *,
    model: Path,
    chunk_tokens: int = CHUNK_TOKENS,
    python: Path | None = None,
    timeout_s: float = 3600.0,
) -> dict[str, LmcacheResult]:
    """Encode and decode KV with LMCache's CacheGen.

    Args:
        tensors: KV `[L, 2, T, N, H]` by any name.
        model: Folder of the model, from whose configuration LMCache takes its bins.
        chunk_tokens: Tokens per chunk.
        python: Interpreter with LMCache; None: the one that `LEARNONCE_LMCACHE_PYTHON` names.
        timeout_s: Bound on the whole run.

    Raises:
        LmcacheUnusableError: There is no such interpreter, or LMCache did not work in it.
    """
    interpreter = python or find_python()
    with tempfile.TemporaryDirectory(prefix="learnonce-lmcache-") as folder:
        asked, answered = Path(folder, "asked.safetensors"), Path(folder, "answered.safetensors")
        save_file({name: kv.contiguous() for name, kv in tensors.items()}, asked)
        command = [interpreter, __file__, asked, answered, "--model", model, "--chunk-tokens", str(chunk_tokens)]
        # What this process imports from is none of that interpreter's business.
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            done = subprocess.run(
                [str(part) for part in command],
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LmcacheUnusableError(f"LMCache's interpreter {interpreter} did not run: {error}") from error
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise LmcacheUnusableError(f"LMCache failed in {interpreter}: {last[0]}")
        return _read_answer(answered)


def find_python() -> Path:
    """The interpreter that the environment variable names.

    Raises:
        LmcacheUnusableError: It names none, or one that is not there.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    if not named:
        raise LmcacheUnusableError(f"{PYTHON_VARIABLE} does not name an interpreter with LMCache")
    if not os.access(named, os.X_OK):
        raise LmcacheUnusableError(f"{PYTHON_VARIABLE} names {named}, which cannot be run")
    return Path(named)


def _read_answer(path: Path) -> dict[str, LmcacheResult]:
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[_FACTS])
        return {name: LmcacheResult(kv_L2TNH=file.get_tensor(name), **found) for name, found in facts.items()}


# From here on, as a program in LMCache's environment. Nothing of this project is imported there.


def main(arguments: list[str]) -> None:
    """Read tensors from one file, write what LMCache makes of them to another."""
    parser = argparse.ArgumentParser(description="Encode and decode KV with LMCache's CacheGen.")
    parser.add_argument("asked", type=Path, help="safetensors file with KV [layer, K/V, token, head, dim]")
    parser.add_argument("answered", type=Path, help="where decoded KV and facts go")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--chunk-tokens", type=int, default=CHUNK_TOKENS)
    options = parser.parse_args(arguments)
    decoded, facts = {}, {}
    with safe_open(options.asked, framework="pt") as file:
        names = file.keys()
        for name in names:
            decoded[name], facts[name] = _through_lmcache(file.get_tensor(name), options.model, options.chunk_tokens)
    save_file(decoded, options.answered, metadata={_FACTS: json.dumps(facts)})


def _through_lmcache(kv_L2TNH: torch.Tensor, model: str, chunk_tokens: int) -> tuple[torch.Tensor, dict[str, Any]]:
    serde = "lmcache.storage_backend.serde"
    # Of their settings and metadata, only these are read.
    config, metadata = SimpleNamespace(chunk_size=chunk_tokens), SimpleNamespace(model_name=model)
    encoder = importlib.import_module(f"{serde}.cachegen_encoder").CacheGenSerializer(config, metadata)
    decoder = importlib.import_module(f"{serde}.cachegen_decoder").CacheGenDeserializer(
        config, metadata, kv_L2TNH.dtype
    )
    starts = range(0, kv_L2TNH.shape[2], chunk_tokens)
    chunks = [kv_L2TNH[:, :, start : start + chunk_tokens].contiguous() for start in starts]
    decoder.from_bytes(encoder.to_bytes(chunks[0]))  # Compiles, which is not to be timed.
    began_s = time.perf_counter()
    payloads = [encoder.to_bytes(chunk) for chunk in chunks]
    encoded_s = time.perf_counter()
    parts = [decoder.from_bytes(payload).contiguous() for payload in payloads]
    ended_s = time.perf_counter()
    facts = {
        "num_bytes": sum(map(len, payloads)),
        "encode_s": encoded_s - began_s,
        "decode_s": ended_s - encoded_s,
        "lmcache_version": version("lmcache"),
    }
    return torch.cat(parts, dim=2), facts


if __name__ == "__main__":
    main(sys.argv[1:])
