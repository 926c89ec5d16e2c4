import codecs
import gzip
import io
import itertools
import json

import pandas as pd
import pytest
import torch

from pftools import corpora, inputs, settings
from pftools.corpora import pydocs, splits
from pftools.errors import PftoolsError
from pftools.finetune import training_rows
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_no_paragraph_of_pydocs_is_in_two_splits():
    paragraphs = {
        split: set().union(*(pydocs.paragraphs(text) for text in corpora.documents("pydocs", split=split)))
        for split in corpora.SPLITS
    }
    for one in corpora.SPLITS:
        for other in corpora.SPLITS:
            assert one == other or not paragraphs[one] & paragraphs[other]


def test_every_split_of_pydocs_holds_its_share():
    sizes = {split: sum(map(len, corpora.documents("pydocs", split=split))) for split in corpora.SPLITS}
    total = sum(sizes.values())
    assert total > 300_000
    for split, share in pydocs.SHARES.items():
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


def test_training_rows_read_a_file_once(tokenizer, tmp_path):
    (tmp_path / "tale.txt").write_text("\n\n".join(f"Part {n} of a tale, {n * n}." for n in range(60)))
    parameters = settings.Finetune(corpus=str(tmp_path / "tale.txt"), block_length=16, seed=3)
    with pytest.warns(UserWarning, match="is one file") as told:
        rows = training_rows(parameters, tokenizer)
    assert len(told) == 1
    with pytest.warns(UserWarning, match="is one file"):
        blocks = corpora.token_blocks(tokenizer, parameters.corpus, split="train", block_length=16, seed=3)
    assert torch.equal(rows.input_ids, blocks)


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


# Many documents, as a single file needs them.
TALES = [f"Tale {number}. It was a dark night, and the rain fell." for number in range(40)]
ROWS = [{"text": tale, "number": number} for number, tale in enumerate(TALES)]
LINES = "\n".join(map(json.dumps, ROWS))
PARAGRAPHS = "\n\n".join(TALES)
CSV = "text,number\n" + "\n".join(f'"{tale}",{number}' for number, tale in enumerate(TALES))


def parquet_of(rows):
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_parquet(buffer)
    return buffer.getvalue()


READABLE = {
    "plain.txt": PARAGRAPHS,
    "windows-lines.txt": PARAGRAPHS.replace("\n", "\r\n"),
    "mark-utf8.txt": codecs.BOM_UTF8 + PARAGRAPHS.encode(),
    "mark-utf16.txt": PARAGRAPHS.encode("utf-16"),
    "mark-utf16-big.txt": codecs.BOM_UTF16_BE + PARAGRAPHS.encode("utf-16-be"),
    "mark-utf32.txt": PARAGRAPHS.encode("utf-32"),
    "UPPER.TXT": PARAGRAPHS,
    "notes.md": PARAGRAPHS,
    "packed.txt.gz": gzip.compress(PARAGRAPHS.encode()),
    "with space.txt": PARAGRAPHS,
    "ümlaut.txt": PARAGRAPHS,
    "rows.jsonl": LINES,
    "rows-blank-lines.jsonl": LINES.replace("\n", "\n\n\n"),
    "rows-mark.jsonl": codecs.BOM_UTF8 + LINES.encode(),
    "rows-windows.jsonl": LINES.replace("\n", "\r\n"),
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "rows.json": json.dumps(ROWS),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "separator-in-string.jsonl": LINES.replace("night,", "night,\u2028"),
    "rows.csv": CSV,
    "rows.csv.gz": gzip.compress(CSV.encode()),
    "quoted-line-breaks.csv": CSV.replace("night,", "night,\n"),
    "words-that-look-missing.csv": CSV + "\nNA,1\nnull,2\nnan,3\n007,4",
    "rows.tsv": CSV.replace(",", "\t").replace("night\t", "night,"),
    "semicolons.csv": CSV.replace(",", ";").replace("night;", "night,"),
    "bars.csv": CSV.replace(",", "|").replace("night|", "night,"),
    "excel.csv": CSV.replace(",", "\t").replace("night\t", "night,").encode("utf-16"),
    "spaces-in-header.csv": CSV.replace("text,number", " text , number"),
    "rows.parquet": parquet_of(ROWS),
    "some-empty.jsonl": LINES + '\n{"text": ""}\n{"text": " "}',
    "twice.jsonl": LINES + "\n" + LINES,
}

REFUSED = {
    "cp1252.txt": (("caf\xe9 " * 9 + "\n\n" + PARAGRAPHS).encode("cp1252"), "line 1, is not UTF-8"),
    "cp1252-late.jsonl": (
        (LINES + '\n{"text": "\u201cyes\u201d"}').encode("cp1252"),
        "line 41, is not UTF-8",
    ),
    "latin1.csv": ((CSV + "\ncaf\xe9,1").encode("latin1"), "line 42, is not UTF-8"),
    "utf16-without-mark.txt": (PARAGRAPHS.encode("utf-16-le"), "line 1, holds a null character"),
    "utf16-cut.txt": (PARAGRAPHS.encode("utf-16")[:-1], "is not UTF-16"),
    "binary.txt": (bytes(range(256)), "line 2, is not UTF-8"),
    "shift-jis.txt": (("\u65e5\u672c\u8a9e\n\n" * 50).encode("shift-jis"), "line 1, is not UTF-8"),
    "nothing.txt": ("", "is empty"),
    "blank.txt": (" \n\n \t\n", "is empty"),
    "only-mark.txt": (codecs.BOM_UTF8, "is empty"),
    "short.txt": ("One line, and no more.", "too few"),
    "one-paragraph.txt": ("It rains. " * 999, "too few"),
    "nothing.jsonl": ("", "is empty"),
    "few.jsonl": ("\n".join(LINES.split("\n")[:5]), "holds 5 different documents, too few"),
    "all-alike.jsonl": ((LINES.split("\n")[0] + "\n") * 50, "holds 1 different documents, too few"),
    "no-json.jsonl": (PARAGRAPHS, "line 1, is not a JSON object"),
    "half-a-line.jsonl": (LINES[:-9], "line 40, is not a JSON object"),
    "numbers.jsonl": (LINES + "\n7", "line 41, is not a JSON object"),
    "lists.jsonl": (LINES + '\n["text"]', "line 41, is not a JSON object"),
    "deep.jsonl": ("[" * 10**5, "line 1, is not a JSON object"),
    "null.jsonl": (LINES + '\n{"text": null}', "row 41, has null in the column 'text'"),
    "list.jsonl": (LINES + '\n{"text": ["a", "b"]}', "row 41, has a list in the column 'text'"),
    "number.jsonl": (LINES + '\n{"text": 5}', "row 41, has a number in the column 'text'"),
    "other-column.jsonl": (LINES.replace('"text"', '"content"'), "row 1, has no column text: it has content"),
    "missing-late.jsonl": (LINES + '\n{"words": "x"}', "row 41, has no column text: it has words"),
    "no-columns.jsonl": ("{}\n" * 30, "row 1, has no column text: it has none"),
    "object.json": (json.dumps({"text": TALES}), "is not a list of JSON objects"),
    "strings.json": (json.dumps(TALES), "is not a list of JSON objects"),
    "lines.json": (LINES, "line 2, is not JSON"),
    "nothing.json": ("", "is empty"),
    "nothing.csv": ("", "is empty"),
    "header-only.csv": ("text,number\n", "is empty"),
    "ragged.csv": (CSV + "\na,b,c,d", "Expected 2 fields in line 42, saw 4"),
    "open-quote.csv": (CSV + '\n"a,1', "is not a table"),
    "short-row.csv": ("number,text\n1", "is empty"),
    "no-header.csv": (CSV.partition("\n")[2], "row 1, has no column text"),
    "colons.csv": (CSV.replace(",", ":"), "has no column text: it has text:number; name the column"),
    "no.parquet": (CSV, "damaged, or no Parquet file"),
    "cut.parquet": (parquet_of(ROWS)[:-20], "damaged, or no Parquet file"),
    "null.parquet": (parquet_of([*ROWS, {"text": None, "number": 1}]), "row 41, has null"),
    "lists.parquet": (parquet_of([{"text": ["a"]}] * 30), "row 1, has a list in the column 'text'"),
    "no-gzip.txt.gz": (PARAGRAPHS, "damaged, or no gzip file"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-20], "damaged, or no gzip file"),
    "picture.png": (b"\x89PNG", "is of a kind that is not read"),
    "archive.tar.gz": (gzip.compress(b"x"), "is of a kind that is not read"),
    "no-ending": (PARAGRAPHS, "is of a kind that is not read"),
}


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_there_are_sixty_odd_corpora_and_more():
    assert len(READABLE) + len(REFUSED) >= 60


@pytest.mark.parametrize("name", READABLE)
def test_a_readable_corpus_is_read_whole_and_split_without_overlap(tmp_path, name):
    path = written(tmp_path, name, READABLE[name])
    with pytest.warns(UserWarning, match="is one file, so its (paragraphs|documents) are split"):
        parts = {split: corpora.documents(path, split=split) for split in corpora.SPLITS}
    assert all(parts.values())
    found = sorted("\n\n".join(sum(parts.values(), [])).replace("\n\n", "\n").split("\n"))
    for tale in TALES:
        assert any(tale[:8] in line for line in found), tale
    for one, other in itertools.combinations(corpora.SPLITS, 2):
        assert not set(parts[one]) & set(parts[other])
    assert parts["train"] == corpora.documents(path, split="train")


@pytest.mark.parametrize("name", REFUSED)
def test_an_odd_corpus_is_refused_in_one_sentence(tmp_path, name):
    content, says = REFUSED[name]
    path = written(tmp_path, name, content)
    with pytest.raises(PftoolsError) as refusal:
        corpora.documents(path, split="train")
    message = str(refusal.value)
    assert says in message and path in message, message
    assert ":" in message and message.endswith(".") and "\n" not in message


def test_odd_folders_are_refused_in_one_sentence(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(PftoolsError, match="has no train split: it holds no files"):
        corpora.documents(f"{folder}/", split="train")
    written(folder, "train.jsonl", LINES)
    written(folder, "train.txt", PARAGRAPHS)
    with pytest.raises(PftoolsError, match="has train.jsonl and train.txt: keep one"):
        corpora.documents(f"{folder}/", split="train")
    with pytest.raises(PftoolsError, match="there is no corpus"):
        corpora.documents(f"{tmp_path}/nowhere.txt", split="train")
    with pytest.raises(PftoolsError, match="there is no corpus 'gone.csv.gz'"):
        corpora.documents("gone.csv.gz", split="train")


def test_a_folder_of_texts_is_split_like_one_file(tokenizer, tmp_path, monkeypatch):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, tale in enumerate(TALES):
        written(texts, f"tale {number}.txt", f"{tale}\n\n{tale} Again.\n")
    with pytest.warns(UserWarning, match="texts has no file for a split, so its paragraphs are split"):
        parts = {split: corpora.documents(f"{texts}/", split=split) for split in corpora.SPLITS}
    assert all(parts.values()) and len(set(sum(parts.values(), []))) == sum(map(len, parts.values()))
    whole = "\n\n".join(sum(parts.values(), []))
    assert all(whole.count(tale) == 2 for tale in TALES)
    # A run knows it by all of its files.
    parameters = settings.Finetune(corpus=f"{texts}/")
    before = inputs.visible(parameters)["corpus/train"]
    written(texts, "tale 3.txt", "Another tale.")
    assert inputs.visible(parameters)["corpus/train"] != before
    written(texts, "test.txt", PARAGRAPHS)
    with pytest.raises(PftoolsError, match="has no train split: it holds .*; add a file such as train.jsonl"):
        corpora.documents(f"{texts}/", split="train")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PftoolsError, match="'texts' is none of the data root: .* as ./texts"):
        corpora.documents("texts", split="train")


def test_a_folders_files_may_be_of_any_kind(tmp_path):
    written(tmp_path, "train.csv.gz", gzip.compress(CSV.encode()))
    written(tmp_path, "test.parquet", parquet_of(ROWS[:3]))
    assert corpora.documents(f"{tmp_path}/", split="train") == TALES
    assert corpora.documents(f"{tmp_path}/", split="test") == TALES[:3]
    assert corpora.documents(f"{tmp_path}/", split="calibration") == TALES


def test_a_file_is_never_test_and_training_text_at_once(tokenizer, tmp_path):
    """The blocks of a single file: no text of one split is in another, and equal documents are in one."""
    path = written(tmp_path, "tales.jsonl", LINES + "\n" + LINES)
    with pytest.warns(UserWarning, match="split"):
        texts = {
            split: tokenizer.decode(
                corpora.token_blocks(tokenizer, path, split=split, block_length=16).flatten()
            )
            for split in corpora.SPLITS
        }
    homes = [sum(f"{tale.partition('.')[0]}." in text for text in texts.values()) for tale in TALES]
    assert max(homes) == 1 and sum(homes) > 20


def test_the_split_of_a_file_hangs_on_its_documents_alone():
    documents = [f"{word} {number}" for number in range(300) for word in ("one", "another")]
    parts = splits.split_documents(documents, "a test")
    again = splits.split_documents(documents[::-1], "a test")
    assert {split: sorted(found) for split, found in parts.items()} == {
        split: sorted(found) for split, found in again.items()
    }
    sizes = {split: len(found) / len(documents) for split, found in parts.items()}
    for split, share in splits._SHARES.items():
        assert abs(sizes[split] - share) < 0.02, sizes


# ------------------------------------------------------------------------------------------------------------
# Columns, and data sets of the hub

STORIES = [{"story": tale, "question": f"What is {tale}?", "answer": "It rains."} for tale in TALES]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".csv", ".tsv", ".json", ".parquet"])
def test_another_column_is_named_after_a_colon(tmp_path, ending):
    table, plain = pd.DataFrame(STORIES), ending.removesuffix(".gz")
    content = {
        ".jsonl": table.to_json(orient="records", lines=True),
        ".json": table.to_json(orient="records"),
        ".csv": table.to_csv(index=False),
        ".tsv": table.to_csv(index=False, sep="\t"),
        ".parquet": parquet_of(STORIES),
    }[plain]
    content = gzip.compress(content.encode()) if ending.endswith(".gz") else content
    path = written(tmp_path, f"rows{ending}", content)
    (tmp_path / "tales").mkdir()
    written(tmp_path / "tales", f"train{ending}", content)
    assert corpora.documents(f"{tmp_path}/tales:story", split="train") == TALES
    with pytest.warns(UserWarning, match="is one file"):
        assert set(corpora.documents(f"{path}:story", split="train")) < set(TALES)
    with pytest.raises(PftoolsError, match="row 1, has no column text: it has story, question, answer"):
        corpora.documents(path, split="train")
    with pytest.raises(PftoolsError, match="row 1, has no column stroy: it has story"):
        corpora.documents(f"{path}:stroy", split="train")
    with pytest.raises(PftoolsError, match="columns story, answer are no conversation"):
        corpora.documents(f"{path}:story,answer", split="train")


def test_columns_of_a_conversation_are_one_and_a_text_has_none(tmp_path):
    rows = [{"text": "x", "instruction": tale, "output": "Yes."} for tale in TALES]
    path = written(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="is one file"):
        found = corpora.documents(f"{path}:instruction,output", split="test")
    assert found[0].messages[1] == {"role": "assistant", "content": "Yes."}
    with pytest.raises(PftoolsError, match="is a text without columns: leave ':text' out"):
        corpora.documents(written(tmp_path, "a.txt", PARAGRAPHS) + ":text", split="test")
    odd = written(tmp_path, "rows:text", "")
    with pytest.raises(PftoolsError, match="is of a kind that is not read"):
        corpora.documents(odd, split="test")  # a file whose own name holds a colon


def on_the_hub(monkeypatch, **splits):
    """Data sets as `datasets` gives them; returns what was asked of it."""
    import datasets

    asked = []

    def load(name, configuration=None):
        asked.append((name, configuration))
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        )

    monkeypatch.setattr("datasets.load_dataset", load)
    return asked


def test_a_data_set_of_the_hub_is_named_with_its_column(monkeypatch, tokenizer):
    asked = on_the_hub(monkeypatch, train=STORIES, validation=STORIES[:4], test=STORIES[4:9])
    assert corpora.documents("some.one/tales:story", split="validation") == TALES[:4]
    assert corpora.documents("some.one/tales:story", split="calibration") == TALES
    assert corpora.documents("some.one/tales/dark:question", split="test")[0] == f"What is {TALES[4]}?"
    assert asked == [("some.one/tales", None)] * 2 + [("some.one/tales", "dark")]
    blocks = corpora.token_blocks(
        tokenizer, "some.one/tales:story", split="test", n_blocks=2, block_length=16
    )
    assert tokenizer.decode(blocks.flatten()) == "\n\n".join(TALES[4:9])[:32]
    with pytest.raises(PftoolsError, match="row 1, has no column text: it has story, question, answer"):
        corpora.documents("some.one/tales:text", split="test")


def test_a_run_on_a_data_set_of_the_hub_records_its_revision(tmp_path, monkeypatch):
    from pftools import inputs, settings

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--some.one--tales" / "snapshots" / "0123abcd").mkdir(parents=True)
    found = inputs.visible(settings.Calibrate(corpus="some.one/tales/dark:story"))
    assert found["corpus/calibration"] == "revision 0123abcd"


def test_a_data_set_with_one_split_is_split_by_its_documents(monkeypatch):
    on_the_hub(monkeypatch, train=STORIES)
    with pytest.warns(
        UserWarning, match="some.one/tales has the split train alone, so its documents are split"
    ):
        parts = [corpora.documents("some.one/tales:story", split=split) for split in corpora.SPLITS]
    assert sorted(sum(parts, [])) == sorted(TALES)
    on_the_hub(monkeypatch, train=STORIES, dev=STORIES)
    with pytest.raises(PftoolsError, match="some.one/tales has no test split: it holds train, dev"):
        corpora.documents("some.one/tales:story", split="test")


def test_a_data_set_that_is_not_to_be_had_is_one_sentence(monkeypatch):
    def refuse(*_):
        raise ConnectionError("Couldn't reach 'some.one/tales' on the Hub (offline).\nMore lines.")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(
        PftoolsError, match="no file or folder here, and .*ConnectionError.*offline.*mend"
    ) as found:
        corpora.documents("some.one/tales:story", split="test")
    assert "\n" not in str(found.value)
    with pytest.raises(PftoolsError, match="there is no corpus 'some.one/tales': .* as owner/name:text"):
        corpora.documents("some.one/tales", split="test")


@pytest.mark.parametrize(
    "corpus", ["some.one/tales:story", "some.one/tales/dark:a,b", "tales.jsonl:story", "pydocs"]
)
def test_a_study_keeps_columns_and_paths_count_from_its_folder(tmp_path, monkeypatch, corpus):
    from pftools import contents, run_folder, settings
    from pftools.study.file import locate

    written(tmp_path, "tales.jsonl", "\n".join(map(json.dumps, STORIES)))
    found = locate(corpus, tmp_path, "corpus")
    assert found == (f"{tmp_path}/{corpus}" if corpus.startswith("tales") else corpus)
    assert contents.place_and_column(found)[1] == corpus.partition(":")[2]
    keys = {run_folder.run_key(settings.Calibrate(corpus=name)) for name in (found, f"{found[:-1]}x")}
    assert len(keys) == 2, "the column is part of the key"
    with pytest.raises(PftoolsError, match="there is no corpus 'a/b/c'"):
        locate("a/b/c", tmp_path, "corpus")
    with pytest.raises(PftoolsError, match="there is no corpus 'my.jsonl', which is"):
        locate("my.jsonl:story", tmp_path, "corpus")
