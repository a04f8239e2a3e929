"""The root settings: every room's settings in one tree, from one YAML file.

Covers: composition, where values come from (file, `--set`, defaults), and what follows from the machine (`resolve`).
Does not cover: what each setting of a room means (the room's own `settings.py`; all of them: docs/configuration.md).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.errors import SettingsError
from cluster.settings_base import SettingsBase, load_settings
from decode_workers.settings import DecodeSettings
from kvstore.engine.settings import EngineSettings
from kvstore.settings import StoreSettings
from prefill_workers.settings import PrefillSettings
from router.settings import RouterSettings

CONFIG_VARIABLE: Final = "LEARNONCE_CONFIG"
DEFAULT_FILE: Final = "learnonce.yaml"


class ClusterSettings(SettingsBase):
    """Where the cluster runs and how it is reached."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")] = "local"
    """Name of the cluster: several can run side by side on different ports."""
    address: str = "local"
    """`local` starts a Ray of its own on this machine; `auto` or `host:port` uses a Ray cluster that runs already."""
    host: str = "127.0.0.1"
    """Interface of the HTTP API. Replicas listen on the same one; with a wildcard, on their node's address."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port of the HTTP API."""
    state_dir: str = "~/.local/state/learnonce"
    """Folder of status, log and secret, one folder per cluster name."""
    prefill_replicas: NonNegativeInt = 1
    """Replicas that prefill. 0: decode replicas compute every prompt themselves."""
    decode_replicas: PositiveInt = 1
    """Replicas that generate."""
    start_deadline_s: PositiveFloat = 300.0
    """Give up starting after this."""
    drain_s: PositiveFloat = 30.0
    """How long running requests may take to end when the cluster, or a replica, stops."""
    object_store_bytes: PositiveInt = 100 << 20
    """Ray's object store. Small: no KV travels through it."""


class LogSettings(SettingsBase):
    """Logs of every process of the cluster."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least level that is written."""
    json_lines: bool = False
    """One JSON object per line instead of text."""


class Settings(SettingsBase):
    """Everything that can be set, by room."""

    cluster: ClusterSettings = ClusterSettings()
    """Where the cluster runs."""
    engine: EngineSettings = EngineSettings()
    """The model and the engine, for prefill and decode replicas alike."""
    prefill: PrefillSettings = PrefillSettings()
    """The prefill role."""
    decode: DecodeSettings = DecodeSettings()
    """The decode role."""
    store: StoreSettings = StoreSettings()
    """The node store."""
    router: RouterSettings = RouterSettings()
    """The ingress and its placement rule."""
    log: LogSettings = LogSettings()
    """Logs."""

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        for name, port in self.store.ports().items():
            if port == self.cluster.port:
                raise ValueError(f"store.{name} and cluster.port are both {port}: each needs a port of its own")
        return self


def read_settings(path: str | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a YAML file and `a.b=c` overrides.

    Args:
        path: The file; without one `$LEARNONCE_CONFIG`, then `learnonce.yaml` in this folder, then defaults alone.
        overrides: `dotted.name=value`, the value in YAML.

    Raises:
        SettingsError: A file that cannot be read, or settings that are wrong; every wrong one is named.
    """
    chosen = path or os.environ.get(CONFIG_VARIABLE)
    if chosen is None and Path(DEFAULT_FILE).is_file():
        chosen = DEFAULT_FILE
    values = _read_yaml(Path(chosen)) if chosen else {}
    for override in overrides:
        _set(values, override)
    source = chosen or "settings"
    return load_settings(Settings, values, source=f"{source} with --set" if overrides else source)


def settings_from_json(text: str) -> Settings:
    """Settings that `to_json` wrote."""
    return load_settings(Settings, json.loads(text), source="settings of the running cluster")


def to_json(settings: Settings) -> str:
    """Settings as JSON that `settings_from_json` reads."""
    return settings.model_dump_json(indent=1)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read settings file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected names and values at the top, found {type(values).__name__}")
    return values


def _set(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise SettingsError(f"--set {override!r}: expected name=value, for example --set cluster.port=8001")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {override!r}: the value is not YAML") from error
    *parents, last = name.split(".")
    here = values
    for parent in parents:
        here = here.setdefault(parent, {})
        if not isinstance(here, dict):
            raise SettingsError(f"--set {override!r}: {parent!r} is a value, not a group of settings")
    here[last] = value
