import pytest
import yaml

from tools.write_golden import PATH, format_rows, golden_numbers


def test_the_numbers_are_those_of_the_golden_file():
    rows, expected = golden_numbers(), yaml.safe_load(PATH.read_text())
    assert list(rows) == list(expected)
    assert sum(len(numbers) for numbers in expected.values()) == 3 * (12 + 6 + 12)
    for name, numbers in rows.items():
        assert numbers == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name


def test_the_golden_file_reads_back_as_it_was_written():
    text = PATH.read_text()
    assert format_rows(yaml.safe_load(text)) == text
