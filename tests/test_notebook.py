"""What a notebook's parameters are, however they were written and executed, and what is forgotten."""

import os

import pytest

from pftools import notebook, settings
from pftools.errors import PftoolsError

OWN = "# Parameters: change them here.\n" + "\n".join(
    f"{name} = {field.default!r}" for name, field in settings.Prune.model_fields.items()
)


class Kernel:
    """What IPython does with the namespace: each cell is noted in `In`, then executed."""

    def __init__(self):
        self.names = {"In": [""]}

    def execute(self, source, fails=False):
        self.names["In"].append(source)
        try:
            exec(source, self.names)
        except Exception:
            if not fails:
                raise

    def read(self, kind=settings.Prune):
        self.names["In"].append("parameters = notebook.read(settings.Prune, globals())")
        self.names["parameters"] = notebook.read(kind, self.names)
        return self.names["parameters"]


def written(line, instead_of="sparsity = 0.5"):
    assert instead_of in OWN
    return OWN.replace(instead_of, line)


@pytest.mark.parametrize(
    "line",
    [
        "sparsity: float = 0.6",
        "sparsity, _unused = 0.6, 'ria'",
        "sparsity = _x = 0.6",
        "(sparsity := 0.6)",
        "sparsity = 0.1\nif seed == 0:\n    sparsity = 0.6",
        "if True:\n    sparsity = 0.6\nelse:\n    sparsity = 0.7",
        "import math\nsparsity = math.sqrt(0.36)",
        "def _f():\n    return 0.6\nsparsity = _f()",
        "sparsity = 0.5\nsparsity += 0.1",
    ],
)
def test_a_value_is_read_however_it_is_written(line):
    kernel = Kernel()
    kernel.execute(OWN.replace("sparsity = 0.5\n", "").replace("seed = 0", "seed = 0\n" + line))
    assert kernel.read().sparsity == pytest.approx(0.6)


def test_a_changed_first_comment_line_drops_nothing():
    kernel = Kernel()
    kernel.execute("# mine\n" + written("sparsity = 0.6").partition("\n")[2])
    assert kernel.read().sparsity == 0.6


def test_a_deleted_line_leaves_no_old_value():
    kernel = Kernel()
    kernel.execute(written("sparsity = 0.6"))
    assert kernel.read().sparsity == 0.6
    kernel.execute(OWN.replace("sparsity = 0.5\n", ""))
    assert kernel.read().sparsity == 0.5  # the default, and not what the kernel still holds


def test_a_misspelt_name_that_was_mended_is_accepted_without_a_restart():
    kernel = Kernel()
    kernel.execute(written("sparsty = 0.6"))
    with pytest.raises(PftoolsError, match="did you mean 'sparsity'"):
        kernel.read()
    kernel.execute(written("sparsity = 0.6"))
    assert kernel.read().sparsity == 0.6


def test_what_papermill_injects_wins_where_it_comes_after():
    kernel = Kernel()
    kernel.execute(OWN)
    kernel.execute("# Parameters\nsparsity = 0.3\n")
    assert (kernel.read().sparsity, kernel.read().method) == (0.3, "wanda")
    kernel.execute(written("sparsity = 0.7"))
    assert kernel.read().sparsity == 0.7


def test_papermills_lists_and_nulls_are_understood():
    kernel = Kernel()
    kernel.execute("# Parameters: of evaluate\ncorpus = 'pydocs'")
    kernel.execute("# Parameters\ntasks = '[\"facts\"]'\nlimit = 'null'\nn_blocks = '3'\ndata = 'null'")
    parameters = kernel.read(settings.Evaluate)
    assert (parameters.tasks, parameters.limit, parameters.n_blocks) == (["facts"], None, 3)
    assert parameters.data == "null"  # a parameter of text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("if seed:\n    sparsity = 0.6", "depends on a condition"),
        ("for sparsity in []:\n    pass", "depends on a condition"),
        ("exec('sparsity = 0.6')", "as it uses exec"),
        ("globals()['sparsity'] = 0.6", "as it uses globals"),
        ("from math import *", r"as it uses import \*"),
        ("def _f():\n    global sparsity\n    sparsity = 1\n_f()", "as it uses global"),
        ("other = 0.6", "unknown parameter 'other'"),
    ],
)
def test_what_cannot_be_known_is_refused(line, says):
    kernel = Kernel()
    kernel.execute(OWN)
    kernel.execute(OWN.replace("sparsity = 0.5\n", "") + "\n" + line)
    with pytest.raises(PftoolsError, match=says):
        kernel.read()


def test_a_parameter_that_another_cell_sets_is_refused():
    kernel = Kernel()
    kernel.execute(OWN)
    kernel.execute("sparsity = 0.9")
    with pytest.raises(PftoolsError, match=r"sparsity was set again in cell \[2\]"):
        kernel.read()


def test_a_parameters_cell_that_failed_half_way_is_refused():
    kernel = Kernel()
    kernel.execute(OWN)
    kernel.execute("# Parameters: mine\nmethod = no_such_name\nsparsity = 0.6", fails=True)
    with pytest.raises(PftoolsError, match="execute that cell again, to its end"):
        kernel.read()


def test_without_a_parameters_cell_nothing_is_read():
    with pytest.raises(PftoolsError, match="no parameters cell was executed"):
        Kernel().read()


def test_reading_again_forgets_what_was_made_from_the_earlier_parameters():
    kernel = Kernel()
    kernel.execute(OWN)
    kernel.read()
    kernel.execute("import math\nmine = []\ndef use(): return parameters")
    kernel.execute(
        "network = parameters.model\nblocks = [network]\nmine.append(len(blocks))\nother = math.pi"
    )
    kernel.read()
    assert not {"network", "blocks"} & set(kernel.names)
    assert kernel.names["mine"] == [1] and {"math", "use", "other"} <= set(kernel.names)


def test_paths_count_from_the_project_and_the_kernel_stays_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "texts.txt").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    kernel = Kernel()
    kernel.execute("# Parameters: mine\nmodel = 'models/mine'\ncorpus = 'texts.txt'\nruns = 'runs'")
    parameters = kernel.read()
    assert os.getcwd() == str(tmp_path / "notebooks")
    assert parameters.runs == str(tmp_path / "runs") and parameters.model == str(tmp_path / "models" / "mine")
    assert parameters.corpus == str(tmp_path / "texts.txt")
    kernel.execute("# Parameters: mine\nmodel = 'somebody/model'\ncorpus = 'pydocs'")
    parameters = kernel.read()
    assert (parameters.model, parameters.corpus, parameters.calibration) == ("somebody/model", "pydocs", "")
    assert parameters.runs == str(tmp_path / "runs")  # a default counts from there, too
    monkeypatch.chdir(tmp_path)
    assert kernel.read().runs == "runs"
