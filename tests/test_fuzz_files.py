"""Damaged files end in a sentence or are read in full; ``benchmarks/fuzz_files.py`` does it longer, and trains."""

import pytest
from fuzzed_files import fuzz_one


@pytest.mark.parametrize("hundred", range(3))
def test_damaged_files_are_refused_in_a_sentence_or_read_in_full(tmp_path, hundred):
    outcomes = [fuzz_one(seed, tmp_path) for seed in range(100 * hundred, 100 * hundred + 100)]
    read = outcomes.count("read")
    assert 10 < read < 90, "the files are all damaged, or none is"
