import json

import pytest
import torch

from pftools import corpora
from pftools.errors import PftoolsError
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_no_paragraph_of_pydocs_is_in_two_splits():
    paragraphs = {
        split: set().union(*(corpora._paragraphs(text) for text in corpora.documents("pydocs", split=split)))
        for split in corpora.SPLITS
    }
    for one in corpora.SPLITS:
        for other in corpora.SPLITS:
            assert one == other or not paragraphs[one] & paragraphs[other]


def test_every_split_of_pydocs_holds_its_share():
    sizes = {split: sum(map(len, corpora.documents("pydocs", split=split))) for split in corpora.SPLITS}
    total = sum(sizes.values())
    assert total > 300_000
    for split, share in corpora._PYDOCS_SHARES.items():
        assert abs(sizes[split] / total - share) < 0.06, (split, sizes)


def test_test_blocks_are_the_text_in_order(tokenizer):
    blocks = corpora.token_blocks(tokenizer, "pydocs", split="test", n_blocks=3, block_length=50)
    text = "\n\n".join(corpora.documents("pydocs", split="test"))
    assert blocks.shape == (3, 50) and blocks.dtype == torch.long
    assert tokenizer.decode(blocks.flatten()) == tokenizer.decode(tokenizer(text[:400])["input_ids"][:150])


def test_calibration_blocks_follow_the_seed(tokenizer):
    def draw(seed):
        return corpora.token_blocks(
            tokenizer, "pydocs", split="calibration", n_blocks=8, block_length=64, seed=seed
        )

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert len(torch.unique(draw(0), dim=0)) == 8


def test_more_calibration_blocks_than_there_are_overlap_and_say_so(tokenizer, tmp_path):
    (tmp_path / "train.txt").write_text("a b c d e f g h " * 20)
    with pytest.warns(UserWarning, match="overlap"):
        blocks = corpora.token_blocks(
            tokenizer, f"{tmp_path}/", split="calibration", n_blocks=9, block_length=100
        )
    assert blocks.shape == (9, 100)


def test_a_data_root_folder_is_a_corpus(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "tales").mkdir()
    rows = [{"text": "Once upon a time."}, {"text": ""}, {"text": "The end."}]
    (tmp_path / "tales" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("PFTOOLS_DATA", str(tmp_path))
    assert corpora.documents("tales", split="train") == ["Once upon a time.", "", "The end."]
    with pytest.raises(PftoolsError, match="has no test split: it holds train"):
        corpora.documents("tales", split="test")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"corpus": "pydoc"}, "did you mean 'pydocs'"),
        ({"split": "tset"}, "did you mean 'test'"),
        ({"n_blocks": 10**6}, "ask for at most that many"),
        ({"block_length": 10**7}, "choose a shorter block_length"),
        ({"block_length": 1}, "at least 2 tokens"),
        ({"n_blocks": 0}, "at least 1 block"),
        ({"corpus": "c4"}, "could not be fetched from the hub"),
    ],
)
def test_bad_requests_are_one_sentence(tokenizer, options, says, monkeypatch):
    monkeypatch.delenv("PFTOOLS_DATA", raising=False)
    request = {"corpus": "pydocs", "split": "test", "n_blocks": 2, "block_length": 16, **options}
    with pytest.raises(PftoolsError, match=says):
        corpora.token_blocks(tokenizer, request.pop("corpus"), **request)


def test_an_empty_file_and_a_wrong_column_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(PftoolsError, match="is empty"):
        corpora.documents(str(tmp_path / "empty.txt"), split="test")
    (tmp_path / "rows.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(PftoolsError, match="row 1, has no column text: it has words"):
        corpora.documents(str(tmp_path / "rows.jsonl"), split="test")
