"""Values as YAML 1.2 reads them, and mistakes with their line."""

import pytest

from pftools.errors import PftoolsError
from pftools.study.yaml_file import read_yaml


@pytest.fixture
def read(tmp_path):
    def write_and_read(content):
        path = tmp_path / "mine.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_yaml(path)

    return write_and_read


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("010", 10),  # 8 in YAML 1.1
        ("2:4", "2:4"),  # 124 in YAML 1.1
        ("[2:4, 4:8]", ["2:4", "4:8"]),
        ("1e-3", 0.001),  # a text in YAML 1.1
        ("no", "no"),  # false in YAML 1.1
        ("2024-01-01", "2024-01-01"),  # a date in YAML 1.1
        ("true", True),
        ("-.inf", float("-inf")),
        ("0x10", 16),
        ("'010'", "010"),
        ("", None),
        ("~", None),
    ],
)
def test_values_are_those_of_yaml_1_2(read, written, meant):
    assert read(f"value: {written}\n").content == {"value": meant}


def test_a_file_with_a_byte_order_mark_and_merged_keys_is_read(read):
    found = read("\ufeffbase: &base {x: 1, y: 2}\nown: {<<: *base, y: 3}\n").content
    assert found["own"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' stands in line 1 already"),
        ("a:\n  b: 1\n  b: 2\n", "line 3: 'b' stands in line 2 already"),
        ("a: 1\n2: x\n", "line 2: the key '2' is no text.*quotes"),
        ("? [a]\n: b\n", "line 1: a key with parts"),
        ("a: &x [*x]\n", "line 1: this value contains itself"),
        (b"a: 1\nb: \xff\n", "line 2: the file is not UTF-8.*save it"),
        (b"a: 1\nb: \x00\n", r"line 2: the character U\+0000.*remove"),
        ("a: !!int abc\n", "line 1: 'abc' is marked as !!int"),
        ("a: !python/name x\n", "line 1: the mark !python/name is not known"),
        ("a: [1\n", "line 2, column 1: this is not valid YAML"),
        ("a: b: c\n", "line 1, column 5: this is not valid YAML"),
        ("\ta: 1\n", "line 1, column 1: this is not valid YAML"),
        ("a: " + 5000 * "9", "a number of 5000 digits"),
        (3000 * "[", "brackets in brackets"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1.*another document"),
    ],
)
def test_mistakes_are_one_sentence_with_their_line(read, content, says):
    with pytest.raises(PftoolsError, match=says) as error:
        read(content)
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_value_that_grows_without_end_is_refused(read):
    doubling = "".join(f"a{level}: &a{level} [*a{level - 1}, *a{level - 1}]\n" for level in range(1, 25))
    with pytest.raises(PftoolsError, match="values within values"):
        read("a0: &a0 x\n" + doubling)
