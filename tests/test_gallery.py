"""The notebooks as pages with outputs: how one is written."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

MAKE = Path(__file__).parent.parent / "docs" / "gallery" / "make.py"


def test_a_page_has_words_code_numbers_and_pictures_and_no_widget(tmp_path):
    spec = importlib.util.spec_from_file_location("gallery", MAKE)
    gallery = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gallery)
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><text>drawn</text></svg>'
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="a bar of progress"),
        nbformat.v4.new_output("stream", name="stdout", text="perplexity 12.3"),
        nbformat.v4.new_output(
            "display_data", {"image/svg+xml": svg, gallery.LIVE: {}, "text/plain": "chart"}
        ),
        nbformat.v4.new_output("display_data", {gallery.WIDGET: {}, "text/plain": "VBox(children=())"}),
        nbformat.v4.new_output(
            "display_data", {gallery.WIDGET: {}, "text/html": "<p>as it was</p>", "text/plain": "VBox()"}
        ),
    ]
    cells = [
        nbformat.v4.new_markdown_cell("# 2 · Prune"),
        nbformat.v4.new_code_cell("# Parameters\nsparsity = 0.5  # share", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("# Parameters\nsparsity = 0.7", metadata={"tags": ["injected-parameters"]}),
        nbformat.v4.new_code_cell("prune()", outputs=outputs, metadata={"papermill": {"duration": 1}}),
    ]
    page = gallery.write("02_prune", nbformat.v4.new_notebook(cells=cells), tmp_path, {"sparsity": 0.7})
    text = page.read_text()
    assert "# 2 · Prune" in text and "prune()" in text and "perplexity 12.3" in text
    assert text.count("sparsity = 0.7") == 1 and "sparsity = 0.7  # share" in text
    assert "progress" not in text and "VBox" not in text and "as it was" in text
    (picture,) = (tmp_path / "02_prune").iterdir()
    assert f"(02_prune/{picture.name})" in text and "drawn" in picture.read_text()


NOTEBOOKS = sorted((MAKE.parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_a_notebook_is_of_today_and_all_its_pictures_are_there(notebook):
    page = MAKE.parent / f"{notebook.stem}.md"
    text = page.read_text()
    for cell in nbformat.read(notebook, 4).cells:
        for heading in re.findall(r"^#+ .*$", cell.source, re.M) if cell.cell_type == "markdown" else []:
            assert heading in text, f"{heading}: run `make gallery`"
    pictures = re.findall(r"\]\(([^)]+\.(?:svg|png))\)", text)
    assert set(pictures) == {
        f"{notebook.stem}/{path.name}" for path in (MAKE.parent / notebook.stem).iterdir()
    }
    assert pictures and "Traceback" not in text and not re.search(r"(?<![\w.])/(?:tmp|home|work|root)/", text)


def test_the_gallery_is_small():
    assert sum(path.stat().st_size for path in MAKE.parent.rglob("*") if path.is_file()) < 3_000_000
