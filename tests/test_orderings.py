import pytest

from pftools.errors import PftoolsError
from pftools.orderings import PUBLISHED, parse_ordering, sparsity_schedule


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("P", "P"),
        ("F", "F"),
        ("P F", "PF"),
        ("PF", "PF"),
        ("F*5 P", "FFFFFP"),
        ("(P F)*7", "PF" * 7),
        ("((P F)*2 F)*2", "PFPFFPFPFF"),
        ("  F   P ", "FP"),
    ],
)
def test_words_are_written_out(text, letters):
    assert parse_ordering(text).letters == letters


def test_the_ten_published_pipelines():
    letters = {name: parse_ordering(name).letters for name in PUBLISHED}
    assert letters == {
        "base": "",
        "finetune": "F",
        "finetune_iter": "FFFFF",
        "prune": "P",
        "finetune_prune": "FP",
        "prune_finetune": "PF",
        "finetune_iter_prune": "FFFFFP",
        "prune_finetune_iter": "PFFFFF",
        "iter_pf": "PF" * 7,
        "iter_fp": "FP" * 7,
    }


def test_iterative_pipelines_rise_by_a_tenth_a_round_and_report_each():
    steps = parse_ordering("iter_pf").steps(0.7)
    assert [step.sparsity for step in steps if step.kind == "P"] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    )
    assert [step.reported for step in steps] == [False, True] * 7
    assert [step.number for step in steps if step.kind == "F"] == [1, 2, 3, 4, 5, 6, 7]
    assert [step.reported for step in parse_ordering("iter_fp").steps(0.7)] == [False, True] * 7


def test_only_the_end_is_reported_of_a_custom_word():
    assert [step.reported for step in parse_ordering("P F P F").steps(0.5)] == [False, False, False, True]
    assert parse_ordering("base").steps(0.5) == ()


def test_the_cubic_schedule_is_steep_first_and_ends_at_the_target():
    rising = sparsity_schedule(0.6, 3, "cubic")
    assert rising == pytest.approx([0.6 * (1 - (2 / 3) ** 3), 0.6 * (1 - (1 / 3) ** 3), 0.6], abs=1e-6)
    assert rising[-1] == 0.6


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prune_finetnue", "did you mean 'prune_finetune'"),
        ("", "unknown ordering"),
        ("P X", "character 3"),
        ("(P F", "closing bracket"),
        ("P*0", "count of at least 1"),
        ("P*", "count of at least 1"),
        ("()", "empty bracket"),
        ("(P F)*100000", "more than 1000 steps"),
        ("P )", "character 3"),
    ],
)
def test_what_cannot_be_read_is_named(text, says):
    with pytest.raises(PftoolsError, match=says):
        parse_ordering(text)


def test_a_sparsity_out_of_range_is_refused():
    with pytest.raises(PftoolsError, match="from 0 up to 1"):
        parse_ordering("P").steps(1.0)
