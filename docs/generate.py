"""Write the pages that are made from the code: metrics, configuration, and the JSON schema of the settings.

Covers: `docs/metrics.md` from every room's `metrics.py`, `docs/configuration.md` and `docs/settings.schema.json` from
`cluster.settings.Settings`. Does not cover: pages written by hand.

    python docs/generate.py            write the pages
    python docs/generate.py --check    exit 1 and name the pages that are stale
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
ROOMS: Final = ("cluster", "router", "prefill_workers", "decode_workers", "kvstore", "loadtest")
_NOTICE: Final = "<!-- Written by docs/generate.py: change the code it names, then run `make docs`. -->"

Schema = Mapping[str, Any]

ENVIRONMENT: Final = {
    "LEARNONCE_CONFIG": "Path of the YAML file, where `--config` is not given.",
    "LEARNONCE_MODEL_HOME": "Folder of converted models. Default `~/.cache/learnonce/models`; `make` uses `.models`.",
    "LEARNONCE_API_KEYS": "Accepted API keys, separated by commas. Unset: the API asks for none.",
    "LEARNONCE_API_KEY": "The key that `learnonce ask`, `explain`, `demo` and `bench` send.",
    "LEARNONCE_CLUSTER_SECRET": "Secret that plans and store connections are signed with, in hex. Made by `learnonce "
    "up` and passed to every process of the cluster.",
    "LEARNONCE_STORE_KEY": "Key of records at rest, 32 bytes in hex (`openssl rand -hex 32`), the same on all nodes; "
    "needed with `store.encrypt_at_rest`. `new,old` rotates.",
    "LEARNONCE_DATA": "Folder of texts for `learnonce bench codec` and `bench join`, where `--data` is not given.",
    "LEARNONCE_LMCACHE_PYTHON": "Python of an environment with LMCache; `bench codec` then measures its codec too.",
    "LEARNONCE_CLUSTER_ID": "Random name of one local cluster's life. Every process of it carries it, which is how "
    "`learnonce down` finds exactly its own. Set by `learnonce up`.",
}
"""Environment variables that this project reads. Everything that is no secret, path or identity is a setting."""


def pages() -> dict[str, str]:
    """Every generated page: path below the repository's root, and its text."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    schema = importlib.import_module("cluster.settings").Settings.model_json_schema()
    return {
        "docs/metrics.md": metrics_page(),
        "docs/configuration.md": configuration_page(schema),
        "docs/settings.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
    }


def metrics_page() -> str:
    """One table per room from the definitions that the rooms declare when they are imported."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("metrics.py")):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    definitions = importlib.import_module("cluster.telemetry").DEFINITIONS.values()
    by_room: dict[str, list[Any]] = {}
    for definition in definitions:
        by_room.setdefault(definition.name.split("_")[1], []).append(definition)
    lines = [
        "# Metrics",
        "",
        _NOTICE,
        "",
        "`GET /metrics` of the API answers in Prometheus' text format. Names are `learnonce_<room>_<noun>_<unit>`, and",
        "counters end in `_total`. Labels come from small closed sets: never ids, never prompts. vLLM's own metrics",
        "(`vllm:...`) stand on the same page. Bucket bounds of every histogram are the same (`cluster/telemetry.py`).",
    ]
    for room in sorted(by_room):
        lines += ["", f"## {room}", "", "| name | kind | labels | what it counts | when it moves |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for item in sorted(by_room[room], key=lambda definition: definition.name):
            labels = ", ".join(f"`{label}`" for label in item.labels) or "none"
            cells = (f"`{item.name}`", item.kind.value, labels, item.meaning, item.when_it_moves)
            lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def configuration_page(schema: Schema) -> str:
    """One table per group of settings from the JSON schema of the root settings."""
    lines = [
        "# Configuration",
        "",
        _NOTICE,
        "",
        "Settings come from one YAML file and from `--set name=value` on the command line, which wins. The file is the",
        "one of `--config`, else of `$LEARNONCE_CONFIG`, else `learnonce.yaml` in the current folder, else none: every",
        "setting has a default. An unknown name or a wrong value is refused with its dotted name, and the command ends",
        "with exit status 2. `learnonce config show` prints the settings in force, `learnonce config schema` the JSON",
        "schema, which is [settings.schema.json](settings.schema.json) and which editors understand.",
        "",
        "```yaml",
        "# learnonce.yaml",
        *_EXAMPLE,
        "```",
    ]
    for name, group in _groups(schema):
        rows = list(_rows(schema, name, group))
        lines += ["", f"## {name}", "", _one_line(group.get("description", "")), ""]
        lines += ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(cells) for cells in rows]
    lines += ["", "## Environment variables", "", "| variable | meaning |", "| --- | --- |"]
    lines += [_row((f"`{name}`", meaning)) for name, meaning in ENVIRONMENT.items()]
    return "\n".join(lines) + "\n"


_EXAMPLE: Final = (
    "cluster:",
    "  port: 8010",
    "  decode_replicas: 2",
    "log:",
    "  level: DEBUG",
)


def _groups(schema: Schema, prefix: str = "", node: Schema | None = None) -> Iterator[tuple[str, Schema]]:
    """Every group that has settings of its own, by dotted name, parents first."""
    node = schema if node is None else node
    if prefix and any(_group_of(schema, field) is None for field in node["properties"].values()):
        yield prefix, node
    for name, field in node["properties"].items():
        group = _group_of(schema, field)
        if group is not None:
            # The description beside the field says more about this place than the class does.
            described = {**group, "description": field.get("description") or group.get("description", "")}
            yield from _groups(schema, f"{prefix}.{name}" if prefix else name, described)


def _rows(schema: Schema, prefix: str, group: Schema) -> Iterator[tuple[str, ...]]:
    for name, field in group["properties"].items():
        # A group that may be null is a row in its parent too: that is where it is switched off.
        if _group_of(schema, field) is None or "anyOf" in field:
            default = _default(field)
            yield f"`{prefix}.{name}`", _type(schema, field), default, _one_line(field.get("description", ""))


def _default(field: Schema) -> str:
    if isinstance(field.get("default"), dict) and "anyOf" in field:
        return "on"
    if "default" in field:
        return _literal(field["default"])
    return "`{}`" if field.get("type") == "object" else "required"


def _group_of(schema: Schema, field: Schema) -> Schema | None:
    """The nested group behind a field, be it one that may be null, or None for a plain value."""
    choices = [choice for choice in field.get("anyOf", ()) if not _is_null(choice)]
    target = _resolve(schema, choices[0] if len(choices) == 1 else field)
    return target if "properties" in target else None


def _resolve(schema: Schema, field: Schema) -> Schema:
    if "$ref" in field:
        target: Schema = schema["$defs"][field["$ref"].rpartition("/")[2]]
        return target
    if len(field.get("allOf", ())) == 1:
        return _resolve(schema, field["allOf"][0])
    return field


def _is_null(field: Schema) -> bool:
    return field.get("type") == "null"


def _type(schema: Schema, field: Schema) -> str:
    """A value's type and bounds in words."""
    field = _resolve(schema, field)
    choices = field.get("anyOf") or field.get("oneOf")
    if choices:
        return " or ".join(_type(schema, choice) for choice in choices)
    if "enum" in field:
        return " or ".join(_literal(value) for value in field["enum"])
    if "const" in field:
        return _literal(field["const"])
    if "properties" in field:
        return "group of settings"
    return _simple_type(schema, field)


def _simple_type(schema: Schema, field: Schema) -> str:
    kind: str = field.get("type", "any")
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    text = words.get(kind, kind)
    if kind == "array":
        items = field.get("items") or (field.get("prefixItems") or [{}])[0]
        text = f"list of {_type(schema, items)}"
    if kind == "object":
        values = field.get("additionalProperties")
        text = f"mapping to {_type(schema, values)}" if isinstance(values, Mapping) else "mapping"
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {field[key]}" for key, word in bounds.items() if key in field]
    if "pattern" in field:
        limits.append(f"matching `{field['pattern']}`")
    return f"{text}, {' and '.join(limits)}" if limits else text


def _literal(value: object) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def stale(made: Mapping[str, str]) -> list[str]:
    """Generated pages whose file is missing or differs."""
    return [
        name
        for name, text in made.items()
        if not (ROOT / name).is_file() or (ROOT / name).read_text(encoding="utf-8") != text
    ]


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description="write the pages that are made from the code")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    check = parser.parse_args().check
    made = pages()
    wrong = stale(made)
    for name in wrong:
        if not check:
            (ROOT / name).write_text(made[name], encoding="utf-8")
        print(f"{'stale' if check else 'written'}: {name}", file=sys.stderr)
    if check and wrong:
        print("run `make docs` and commit the result", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
