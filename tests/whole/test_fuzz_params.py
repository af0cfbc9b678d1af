"""params.yaml, damaged and hostile: loaded as DVC loads it, or refused in one line that names what is wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.config.params import load_params
from pipeline.errors import UsageError
from tests.support.fuzz_campaign import NUM_PARAMS
from tests.support.project import ROOT


@pytest.mark.parametrize("count", [120, pytest.param(NUM_PARAMS, marks=pytest.mark.slow)])
def test_a_file_is_read_as_dvc_reads_it_or_refused_in_one_line(tmp_path: Path, count: int) -> None:
    pytest.importorskip("dvc", reason="comes with the extra dvc")
    from tests.support.fuzz_params import fuzz_params

    tally = fuzz_params(tmp_path, count, random.Random(count))
    assert tally.wrong == []
    assert tally.counts["accepted"] > count // 20 and tally.counts["refused"] > count // 2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("recipe: digits", "recipe: !!str digits", "the tag tag:yaml.org,2002:str"),
        ("count: 16", "count: " + "1" * 31, "more than 30 digits"),
        ("# What `dvc repro`", "# What\u2028`dvc repro`", "'\\u2028' may end a line"),
        ("  titn: default", "  1e3: default", "the key '1e3' is not a plain name; quote it"),
        ("  titn: default", "  <<: {titn: default}", "the key '<<' is not a plain name"),
        ("recipe: digits", "recipe: &it digits", "the anchor or alias it"),
        ("recipe: digits", "recipe: digits\nrecipe: mnist", "the key 'recipe' is given twice; keep one"),
        ("recipe: digits", "recipe: [digits", "not valid YAML: while parsing a flow sequence"),
        ("# What `dvc repro`", "%YAML 1.1\n---\n# What `dvc repro`", "'%' begins a directive"),
        ("recipe: digits", "? [a]\n: digits", "a sequence as a key"),
        ("recipe: digits", "recipe: " + "[" * 3000, "nested too deeply"),
    ],
)
def test_what_no_params_file_needs_is_named_with_its_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    file, text = tmp_path / "params.yaml", (ROOT / "params.yaml").read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as error:
        load_params(file)
    assert words in str(error.value) and str(error.value).startswith(f"{file}")
