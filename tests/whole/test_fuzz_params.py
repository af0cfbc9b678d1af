"""params.yaml, damaged and hostile: loaded as DVC loads it, or refused in one line that names what is wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.config.params import load_params
from pipeline.errors import UsageError
from tests.support.fuzz_campaign import NUM_PARAMS
from tests.support.project import ROOT

pytest.importorskip("ruamel.yaml", reason="DVC's parser, comes with the extra dvc")


@pytest.mark.parametrize("count", [120, pytest.param(NUM_PARAMS, marks=pytest.mark.slow)])
def test_a_file_is_read_as_dvc_reads_it_or_refused_in_one_line(tmp_path: Path, count: int) -> None:
    from tests.support.fuzz_params import fuzz_params

    tally = fuzz_params(tmp_path, count, random.Random(count))
    assert tally.wrong == []
    assert tally.counts["accepted"] > count // 20 and tally.counts["refused"] > count // 2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("recipe: digits", "recipe: !!str digits", "the tag tag:yaml.org,2002:str"),
        ("count: 16", "count: " + "1" * 31, "more than 30 digits"),
        ("# What `dvc repro`", "# What\u2028`dvc repro`", "'\\u2028' ends a line"),
        ("  titn: default", "  1e3: default", "'1e3' is read differently"),
        ("recipe: digits", "? [a]\n: digits", "a sequence as a key"),
        ("recipe: digits", "recipe: " + "[" * 3000, "nested too deeply"),
    ],
)
def test_what_parsers_might_not_agree_about_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    file, text = tmp_path / "params.yaml", (ROOT / "params.yaml").read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as error:
        load_params(file)
    assert words in str(error.value)
