"""The YAML that every parser reads alike.

Scalars that PyYAML (YAML 1.1) and DVC's parser (YAML 1.2) read differently, keys given twice, aliases and tags are
refused: the two programs would otherwise train different things from one params.yaml.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from pipeline.errors import UsageError

MAX_DIGITS = 30  # of an integer; every range ends below
# The plain scalars that YAML 1.1 and 1.2 read alike; everything else that either reads as a number, a boolean or a
# date must be quoted or written in one of these forms.
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+([eE][-+][0-9]+)?\Z")
_LOOKS_NUMERIC = re.compile(r"[-+._0-9][0-9_.,:eE+-]*\Z|[-+]?(0[xXoObB][0-9a-fA-F_]+|\.(inf|Inf|INF|nan|NaN|NAN))\Z")
_BREAKS = re.compile("[\x85\u2028\u2029]")
_YAML11_WORDS = frozenset("y n yes no on off true false null ~".split())


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses aliases, tags, keys given twice and scalars that YAML 1.1 and 1.2 read differently."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise UsageError(f"params.yaml {_place(event)}: the alias *{event.anchor}; write the value out")
        if getattr(event, "tag", None) is not None:
            raise UsageError(f"params.yaml {_place(event)}: the tag {event.tag}; write the value alone")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"params.yaml {_place(key)}: a {key.id} as a key; keys are names")
            if not isinstance(_strict_scalar(self, key), str):
                raise UsageError(f"params.yaml {_place(key)}: the key {key.value!r} is not a plain name; quote it")
            if key.value in seen:
                raise UsageError(f"params.yaml {_place(key)}: the key {key.value!r} is given twice; keep one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _place(mark_owner: Any) -> str:
    return f"line {mark_owner.start_mark.line + 1}"


def _strict_scalar(loader: _StrictLoader, node: yaml.ScalarNode) -> Any:
    """Construct a scalar, refusing whatever the two parsers disagree about."""
    value = node.value
    if node.style is not None:
        return value
    if value in ("true", "false"):
        return value == "true"
    if value in ("null", "~", ""):
        return None
    if _INTEGER.match(value):
        if len(value) > MAX_DIGITS:
            raise UsageError(f"params.yaml {_place(node)}: {value} has more than {MAX_DIGITS} digits")
        return int(value)
    if _FLOAT.match(value):
        return float(value)
    if _LOOKS_NUMERIC.match(value) or value.lower() in _YAML11_WORDS or node.tag != "tag:yaml.org,2002:str":
        raise UsageError(
            f"params.yaml {_place(node)}: {value!r} is read differently by different YAML parsers; "
            "write numbers as 12 or 0.001, booleans as true or false, and put quotes around text"
        )
    return value


for _tag in ("bool", "int", "float", "null", "str", "timestamp", "binary", "merge", "value"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _strict_scalar)


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML strictly; `where` begins the message of what is not YAML.

    Raises:
        UsageError: It is not valid YAML, or read differently by different parsers.
    """
    odd = _BREAKS.search(text)
    if odd is not None:
        line = text.count("\n", 0, odd.start()) + 1
        raise UsageError(f"{where} line {line}: {odd[0]!a} ends a line for some YAML parsers; remove it")
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply; params.yaml has six levels") from None
    except (yaml.YAMLError, ValueError, IndexError) as error:
        raise UsageError(f"{where}: not valid YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
