"""Damaged, hostile and merely odd params.yaml files: each is loaded as DVC reads it, or refused in one line."""

from __future__ import annotations

import copy
import io
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dvc.utils.serialize import parse_yaml
from ruamel.yaml import YAML

from pipeline.config.params import MAX_BYTES, load_params, parse_params
from pipeline.errors import MAX_LINE, UsageError
from tests.support.project import ROOT, smoke_params
from tests.support.tally import Tally
from tests.support.time_limit import Hung, time_limit

SECONDS_UNTIL_HUNG = 60
MARKER = "made-by-a-tag"

# Written plainly; YAML 1.1 and 1.2, and their parsers, disagree about many of them.
SCALARS = (
    "", "~", "null", "Null", "NULL", "true", "True", "TRUE", "yes", "Yes", "no", "NO", "on", "off", "y", "N", "=", "<<",
    "0", "-0", "+0", "00", "010", "-010", "08", "0o10", "0O10", "0x10", "0X10", "0b11", "1_000", "1__0", "_1", "-_1",
    "_",
    "1e3", "1E3", "1e-3", "1.e3", "1.0e3", "1.0e+3", "1.0E-3", "-1.5e+2", ".5", "+.5", "-.5", "5.", "+1", "+1.0", "-1",
    ".inf", "-.inf", "+.inf", ".Inf", ".INF", ".nan", ".NaN", "nan", "NaN", "inf", "Infinity", "-inf", "1.0e+400",
    "-0.0",
    "1.0e-400", "0.1", "0.30000000000000004", "1.7976931348623157e+308", "12:30:45", "1:30", "190:20:30.15", "12:30",
    "2026-01-01", "2026-1-1", "2001-12-14t21:59:43.10-05:00", "2001-12-14 21:59:43", "1-1", "1,000", "1.000,5", "1/2",
    "1" * 31, "9" * 4299, "9" * 4301, "-" + "9" * 400, "1" + "0" * 400, "0." + "1" * 4000, "2147483648", "100001",
    "9223372036854775808", "18446744073709551616", "[]", "{}", "[1]", "{a: 1}", "[[[]]]", "''", '""', "'1'", '"1"',
    '"\\x41"', '"\\u0000"', '"\\ud800"', '"\\/"', "|", ">", "|-\n  text", "!!str 5", "!!int '5'", "!!float 5",
    "!!bool yes",
    "!!null x", "!!binary aGk=", "!!timestamp 2026-01-01", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "! 5",
    "!x 5",
    "!<tag:yaml.org,2002:int> 5", f"!!python/object/apply:os.mkdir [{MARKER}]", "!!python/name:os.system",
    "!!python/object/new:os.mkdir\n  args: [x]", "!!merge x", "!!value x", "&a 5", "*a", "&a [*a]", "@x", "`x`",
    "%x", "-",
    "- 1", "? 1", ":", "::", "a:b", "a: b", "a #b", "a#b", "#b", "sgd", "lion", "cutmix", "１２", "٣", "½", "é",
    "e\u0301",
    "😀", "\u202e1", "\u200b1", "\ufeff1", "1\u00a0", "x" * 5000, "None", "none", "imagenet", "../../etc/passwd",
    "digits\n",
)  # fmt: skip
KEYS = (
    "", "~", "no", "yes", "on", "1", "1e-3", "1e3", "0o7", "010", "1_0", "12:30", "2026-01-01", "true", ".inf", "=",
    "<<", "a b",
    "é", "😀", "A", "-", "'x'", '"no"', "'1e3'", "? x", "[a]", "{a: 1}", "!!str x", "!!int 1", "*a", "&a x", "x" * 65,
    "x" * 1100,
    "epoch", "optimiser", "__class__", "count", "default", "name", "self", "cls", "1e5-x", "con", "\u2028",
)  # fmt: skip
FRAGMENTS = (
    b"\t", b"\x00", b"\x07", b"\x1b[31m", b"\x7f", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80",
    b"\xc2\x85",
    b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xc2\xa0", b"\xe2\x80\x8b", b"\r", b"\r\n", b"\n", b"\n\n", b" ", b"  ",
    b"---\n", b"\n---\n",
    b"\n...\n", b"%YAML 1.1\n---\n", b"%YAML 1.2\n---\n", b"%YAML 9.9\n---\n", b"%TAG !! tag:x,2000:\n---\n", b"# ",
    b" #", b"#",
    b"&a ", b"*a", b"!!str ", b"! ", b"'", b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b": ", b"?", b"? ",
    b"- ", b"-", b"|", b">",
    b"|2\n", b"%", b"@", b"`", b"<<: *a\n", b"<<: {epochs: 1}\n", b"\n  x:\n", b"a" * 2000, b"0", b"_", b".", b"+",
    b"e",
)  # fmt: skip


class Case(NamedTuple):
    """A file, and where the odd thing in it stands: either of the words must be in a refusal, if there are any."""

    kind: str
    data: bytes
    words: tuple[str, ...] = ()


def small_params() -> str:
    """The head of the project's params.yaml with the recipe `smoke` alone, which is quick to load."""
    text = smoke_params((ROOT / "params.yaml").read_text())
    head = text[: text.index("\nrecipes:\n")]
    return f"{head}\nrecipes:\n\n  smoke:\n{text.split(chr(10) + '  smoke:' + chr(10))[1]}"


def cases(count: int, rng: random.Random) -> Iterator[Case]:
    """Yield bombs, then as many other cases as it takes, of all kinds in turn."""
    small, whole = small_params(), (ROOT / "params.yaml").read_text()
    tree = YAML(typ="safe", pure=True).load(small)
    yield from bombs(small)
    makers: tuple[Callable[[str, random.Random], Case], ...] = (
        odd_scalar,
        odd_key,
        lambda text, rng: odd_structure(tree, rng),
        odd_fragments,
        odd_bytes,
    )
    for number in range(max(0, count - len(bombs(small)))):
        text = whole if rng.random() < 0.02 else small
        yield makers[number % len(makers)](text, rng)


def odd_scalar(text: str, rng: random.Random) -> Case:
    """Write another scalar in the place of one."""
    match = rng.choice(list(re.finditer(r"(?<=: )[A-Za-z0-9_.-]+(?=[,}\]\n])|(?<=, )[a-z0-9_]+(?=[,\]])", text)))
    scalar = rng.choice(SCALARS)
    return _replaced(text, match, scalar, "scalar")


def odd_key(text: str, rng: random.Random) -> Case:
    """Write another key in the place of one, or repeat one."""
    matches = list(re.finditer(r"[a-z0-9_-]+(?=:[ \n])", text))
    match = rng.choice(matches)
    key = rng.choice(KEYS) if rng.random() < 0.8 else rng.choice(matches)[0]
    return _replaced(text, match, key, "key")


def _replaced(text: str, match: re.Match[str], new: str, kind: str) -> Case:
    line = text.count("\n", 0, match.start()) + 1
    key = re.findall(r"[a-z0-9_-]+(?=:)", text[: match.end() + 1])[-1]
    changed = text[: match.start()] + new + text[match.end() :]
    # A line of a file that is no longer YAML is only near it.
    words = (f"line {line}", f"line {line + 1}", key, "YAML", *([new] if new else []))
    return Case(kind, changed.encode("utf-8", "surrogatepass"), words)


def odd_structure(tree: Any, rng: random.Random) -> Case:
    """Delete, replace, rename, add or move something, in valid YAML."""
    tree = copy.deepcopy(tree)
    mappings: list[dict[str, Any]] = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            mappings.append(node)
            for value in node.values():
                visit(value)

    visit(tree)
    node = rng.choice([mapping for mapping in mappings if mapping])
    key = rng.choice(list(node))
    other = rng.choice(mappings)
    value = rng.choice([
        None, True, False, 0, 1, -1, 2**31, 10**25, 10**400, 0.5, -0.5, 1e300, float("inf"), float("nan"), "", "x",
        "é\n", "sgd",
        [], [None], [1, "a"], ["titn", "titn"], {}, {"x": 1}, {"default": {}}, [[[[]]]], "9" * 50, b"bytes",
        copy.deepcopy(other),
    ])  # fmt: skip
    change = rng.randrange(4)
    if change == 0:
        del node[key]
    elif change == 1:
        node[key] = value
    elif change == 2:
        other[rng.choice([*KEYS, *node])] = value
    else:
        other[key] = node.pop(key)
    dumper, written = YAML(typ="safe", pure=True), io.StringIO()
    dumper.default_flow_style, dumper.allow_unicode = rng.choice([None, True, False]), rng.random() < 0.5
    dumper.dump(tree, written)
    return Case("structure", written.getvalue().encode())


def odd_fragments(text: str, rng: random.Random) -> Case:
    """Insert one to three fragments that mean something to a YAML parser, or nothing to any."""
    data = text.encode()
    if rng.random() < 0.1:
        data = data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\xc2\x85", b"\xe2\x80\xa8"]))
    starts = [match.start() for match in re.finditer(rb"(?m)^|(?<=: )|(?=:)|(?<=[{\[,])|$", data)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.choice(starts) if rng.random() < 0.7 else rng.randrange(len(data))
        at = 0 if rng.random() < 0.05 else at
        data = data[:at] + rng.choice(FRAGMENTS) + data[at:]
    return Case("fragments", data)


def odd_bytes(text: str, rng: random.Random) -> Case:
    """Flip, cut, repeat, delete or exchange some bytes."""
    data, lines = text.encode(), text.encode().splitlines(keepends=True)
    at, length = rng.randrange(len(data)), rng.randrange(1, 40)
    first, second = rng.sample(range(len(lines)), 2)
    exchanged = [*lines]
    exchanged[first], exchanged[second] = lines[second], lines[first]
    damaged = rng.choice(
        [
            lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
            lambda: data[:at] + rng.randbytes(rng.randrange(1, 4)) + data[at:],
            lambda: data[:at],
            lambda: data[at:],
            lambda: data[:at] + data[at + length :],
            lambda: data[:at] + data[at : at + length] + data[at:],
            lambda: b"".join(exchanged),
            lambda: b"".join([*lines[:first], lines[second], *lines[first:]]),
            lambda: b"".join([*lines[:first], *lines[first + 1 :]]),
            lambda: rng.randbytes(length),
        ]
    )()
    return Case("bytes", damaged)


def bombs(text: str) -> list[Case]:
    """Files made to take time or memory, and files that are no mapping."""
    laughs = "a0: &a0 [lol, lol]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 12))
    depths = (50, 200, 1000)
    texts = [
        laughs + text, text + laughs, "x: &x [*x]\n", "&x {x: *x}\n", "<<: &a {<<: *a}\n",
        *(opening * depth + closing * depth for depth in depths for opening, closing in (("[", "]"), ("{a: ", "}"),
        ("[", ""))),
        *("\n".join(" " * level + "a:" for level in range(depth)) for depth in (50, 400)),
        *("- " * depth for depth in depths), *("? " * depth for depth in depths), "!!str " * 20_000, "[" * 50_000,
        "&a " * 20_000,
        "a" * (MAX_BYTES + 1), "#" * MAX_BYTES, "\n" * MAX_BYTES, " " * MAX_BYTES,
        "a: '" + "x" * (MAX_BYTES - 10) + "'",
        "".join(f"k{n}: 1\n" for n in range(15_000)), "[" + "1," * 50_000 + "]", "9" * (MAX_BYTES - 1),
        "x: " + "9" * 100_000,
        "recipe: " + "é" * 50_000, "'" + "\\" * 100_000, '"' + "\\x41" * 40_000 + '"', '"\\U00110000"', "%" * 10_000,
        "", "\n", "---\n", "---\n---\n", "...", "- 1\n", "5\n", "null\n", "text\n", "'", "\ufeff", "\ufeff" + text,
        text + text,
        f"--- !!python/object/apply:os.mkdir [{MARKER}]\n", f"--- !!python/object/new:os.mkdir [{MARKER}]\n",
        text.replace("\n", "\r\n"), text.replace("\n", "\r"), text.replace(" ", "\t"), "%YAML 1.1\n---\n" + text,
        "\t" + text,
    ]  # fmt: skip
    datas = [text.encode() for text in texts]
    datas += [
        text.encode("utf-16"),
        text.encode("utf-16-be"),
        text.encode("utf-32"),
        b"\x00" * 1000,
        b"\xff" * 1000,
        b"\x80",
    ]
    return [Case("bomb", data) for data in datas]


def fuzz_params(folder: Path, count: int, rng: random.Random) -> Tally:
    """Load cases: each must give what DVC's parser gives too, or one UsageError of one line."""
    tally, file = Tally(), folder / "params.yaml"
    for number, case in enumerate(cases(count, rng)):
        file.write_bytes(case.data)
        verdict, wrong = judge(file, case)
        tally.counts["cases"] += 1
        tally.counts[case.kind] += 1
        tally.counts[verdict] += 1
        if (ROOT / MARKER).exists() or (folder / MARKER).exists() or Path(MARKER).exists():
            wrong.append("executed: a tag ran code")
        tally.note(f"case {number}, {case.kind}, {case.data[-60:]!r}", wrong)
    return tally


def judge(file: Path, case: Case) -> tuple[str, list[str]]:
    """Load one file; return what became of it and what was wrong with that."""
    try:
        with time_limit(SECONDS_UNTIL_HUNG):
            params = load_params(file)
    except UsageError as error:
        return "refused", [*_wrong_message(str(error)), *_unnamed(str(error), case)]
    except Hung:
        return "refused", ["hung"]
    except Exception as error:
        return "refused", [f"raised: {error!r}"[:300]]
    try:
        theirs = parse_params(parse_yaml(case.data.decode(), file))
    except Exception as error:
        return "accepted", [f"differs: DVC reads {error!r}"[:300]]
    return "accepted", [] if theirs == params else ["differs: DVC reads other values"]


def _wrong_message(message: str) -> list[str]:
    is_line = message.isprintable() and 10 < len(message) <= MAX_LINE + 5
    return [] if is_line else [f"message: {message[:200]!r}"]


def _unnamed(message: str, case: Case) -> list[str]:
    named = not case.words or any(word in message for word in case.words)
    return [] if named else [f"unnamed: {message[:300]!r} has none of {[word[:40] for word in case.words]}"]
