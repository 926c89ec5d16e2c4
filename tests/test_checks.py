"""What is told before the first step: each test is named for a fault that used to cost a training or runs."""

import json
import os
import re
import shutil

import pytest

from pftools import settings
from pftools.errors import PftoolsError
from pftools.finetune.recipe import find_targets
from pftools.layers import linear_modules
from pftools.pretrained.model_files import matrices, read_config, weight_shapes
from pftools.study import durations, load_study, plan_study, timing
from pftools.study.checks import check_plan
from pftools.study.costs import estimate_disk
from pftools.study.durations import estimate_first_seconds, first_times
from tests.tiny import save_tiny, tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def checked(tmp_path, tiny):
    """Plans a study of the tiny model, and checks it: `checked("targets: ...", finetune="{...}")`."""

    def run(text="", **sections):
        lines = ["orderings: [P, P F]", f"model: {sections.pop('model', tiny)}", text]
        plain = dict.fromkeys(("calibrate", "finetune", "evaluate"), "{block_length: 64}")
        sections = {**plain, **sections}  # these three are in lines 4, 5 and 6
        lines += [f"{name}: {value}" for name, value in sections.items()]
        path = tmp_path / "mine.yaml"
        path.write_text("\n".join(lines) + "\n")
        plan = plan_study(load_study(path), runs=tmp_path / "runs")
        check_plan(plan)
        return plan

    return run


def test_a_study_without_a_slip_passes(checked):
    assert len(checked().rows) == 2


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"evaluate": "{block_length: 64, tasks: [fcats]}"}, "line 6: .*'fcats'.*did you mean 'facts'"),
        ({"evaluate": "{block_length: 64, corpus: pydcos}"}, "line 6: unknown corpus 'pydcos'"),
        ({"calibrate": "{block_length: 64, corpus: wikitxt}"}, "line 4: unknown corpus 'wikitxt'"),
        ({"calibrate": "{block_length: 1024}"}, "line 4: blocks of 1024 .*longer than the 512"),
        ({"finetune": "{block_length: 1024}"}, "line 5: blocks of 1024 .*longer than the 512"),
        ({"evaluate": "{block_length: 1024}"}, "line 6: blocks of 1024 .*longer than the 512"),
        ({"finetune": "{block_length: 64, targets: q_prj}"}, "line 5: targets 'q_prj' match nothing.*q_proj"),
        ({"patterns": "[4:15]"}, "line 7: the pattern 4:15 does not fit .* no multiple of 15"),
    ],
)
def test_a_slip_is_told_before_the_first_step(checked, sections, says):
    with pytest.raises(PftoolsError, match=says):
        checked(**sections)


def test_a_corpus_without_the_split_that_a_step_reads_is_told(checked, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/train.jsonl").write_text(json.dumps({"text": "words " * 100}) + "\n")
    with pytest.raises(PftoolsError, match="line 6: .*texts has no test split"):
        checked(evaluate="{block_length: 64, corpus: ./texts}")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "line 2: .*BertForMaskedLM.*causal language models"),
        ({"is_encoder_decoder": True}, "line 2: .*only half of a model: give a causal language model"),
    ],
)
def test_a_model_of_another_class_is_told(checked, tiny, tmp_path, changes, says):
    other = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(PftoolsError, match=says):
        checked(model="./other")


@pytest.mark.parametrize("name", ["n_positions", "max_seq_len"])
def test_a_context_by_another_name_counts_too(checked, tiny, tmp_path, name):
    other = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config[name] = config.pop("max_position_embeddings") // 16
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(PftoolsError, match="longer than the 32"):
        checked(model="./other")


def test_a_full_disk_is_told_before_it_is_full(checked, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(PftoolsError, match="need about .* KB.*1 KB left: make room"):
        checked()


@pytest.mark.parametrize("targets", ["all-linear", "attention", "published", "'gate_proj,up_proj'"])
def test_the_disk_estimate_knows_the_targets(checked, targets):
    """Against the modules of the model itself: rank x (inputs + outputs) numbers of 4 bytes each."""
    with_targets = estimate_disk(checked(finetune=f"{{block_length: 64, targets: {targets}}}"))["deltas"]
    model = tiny_llama()
    modules = linear_modules(model)
    adapted = [modules[name] for name in find_targets(model, targets.strip("'"))]
    masks = sum(module.weight.numel() for module in modules.values()) // 8
    assert with_targets == masks + 4 * 8 * sum(module.in_features + module.out_features for module in adapted)


def test_shapes_read_from_files_are_those_of_the_model(tiny):
    modules = linear_modules(tiny_llama())
    wanted = {f"{name}.weight": tuple(module.weight.shape) for name, module in modules.items()}
    assert matrices(weight_shapes(tiny)) == wanted


# Paths in a study


def test_paths_count_from_the_study_file_wherever_one_calls_from(tmp_path, tiny, monkeypatch):
    shutil.copytree(tiny, tmp_path / "project/models/llama")
    (tmp_path / "project/text.txt").write_text("words " * 500)
    study = tmp_path / "project/study.yaml"
    study.write_text("orderings: [P]\nmodel: models/llama\ncalibrate: {corpus: text.txt}\n")
    names = []
    for place in ("project", "elsewhere"):
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        plan = plan_study(load_study(os.path.relpath(study)), runs="runs")
        assert plan.study.model == str(tmp_path / "project/models/llama")
        names.append(list(plan.steps))
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("model: models/llama", "line 2: there is no model 'models/llama'"),
        ("model: ./llama", "line 2: there is no model './llama'"),
        ("model: /nowhere/llama", "line 2: there is no model '/nowhere/llama'"),
        ("model: a/b/c", "line 2: there is no model 'a/b/c'"),
        ("model: ~nobody/llama", "line 2: there is no model '~nobody/llama'"),
        ("calibrate: {corpus: mine.txt}", "line 2: there is no corpus 'mine.txt'"),
        ("evaluate: {corpus: texts/mine.jsonl}", "line 2: there is no corpus 'texts/mine.jsonl'"),
        ("evaluate: {data: nowhere}", "line 2: there is no data root 'nowhere'"),
    ],
)
def test_a_path_to_nothing_is_no_hub_id(tmp_path, line, says):
    path = tmp_path / "study.yaml"
    path.write_text(f"orderings: [P]\n{line}\n")
    with pytest.raises(PftoolsError, match=says):
        load_study(path)


def test_a_path_that_counts_from_here_is_answered_with_the_one_that_works(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, tmp_path / "own/llama")
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/mine.yaml").write_text("orderings: [P]\nmodel: own/llama\n")
    with pytest.raises(PftoolsError, match=r"from here it is '\.\./own/llama'"):
        load_study("studies/mine.yaml")


def test_a_hub_id_stays_one(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("orderings: [P]\nmodel: somebody/model\n")
    assert load_study(path).model == "somebody/model"


# Values


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"tasks": '["facts"]'}, ("tasks", ["facts"])),
        ({"tasks": "facts, reading"}, ("tasks", ["facts", "reading"])),
        ({"tasks": "facts"}, ("tasks", ["facts"])),
        ({"limit": "null"}, ("limit", None)),
        ({"limit": "None"}, ("limit", None)),
        ({"limit": "20"}, ("limit", 20)),
    ],
)
def test_what_papermill_gives_as_text_is_understood(given, meant):
    name, value = meant
    assert getattr(settings.check(settings.Evaluate, given), name) == value


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        (settings.Evaluate, {"limit": True}, "limit.*true and false have no meaning here: give a number"),
        (settings.Evaluate, {"tasks": [True]}, "tasks.*give text"),
        (settings.Evaluate, {"tasks": "[facts"}, "tasks.*a list is written as"),
        (settings.Prune, {"sparsity": False}, "sparsity.*give a number"),
    ],
)
def test_true_is_no_number(kind, given, says):
    with pytest.raises(PftoolsError, match=says):
        settings.check(kind, given)


def test_a_first_run_is_estimated_without_past_runs(checked):
    plan = checked(
        calibrate="{block_length: 64, n_blocks: 3}",
        prune="{held_out_blocks: 2}",
        evaluate="{block_length: 64, n_blocks: 10, tasks: [facts], limit: 5}",
    )
    per_step = estimate_first_seconds(plan, 0.0)
    assert estimate_first_seconds(plan, 0.0, busy=3.0) == pytest.approx(3 * per_step)
    kinds = {step.parameters.step: step.parameters for step in plan.steps.values()}
    forwards = {
        "calibrate": 3 * 64,
        "prune": (2 * 3 + 3) * 64 + 2 * 2 * kinds["prune"].block_length,  # of the calibration's blocks
        "finetune": 4 * kinds["finetune"].tokens + 2 * 8 * kinds["finetune"].block_length,
        "evaluate": 10 * 64 + 5 * 40,
    }
    expected = sum(forwards[step.parameters.step] for step in plan.steps.values())
    assert estimate_first_seconds(plan, 1.0) - per_step == pytest.approx(expected)
    assert re.fullmatch(r"Time: very roughly \d+ minutes, one step after .*", first_times(plan))


@pytest.mark.parametrize(
    ("settings_of", "says"),
    [
        ({"model_type": "model-of-next-year"}, "could not be timed here .*model-of-next-year"),
        (
            {"hidden_size": 9 * 10**5, "intermediate_size": 10**7},
            r"could not be timed here .*one layer takes .* GB",
        ),
    ],
)
def test_a_model_that_cannot_be_timed_is_said(checked, monkeypatch, settings_of, says):
    plan = checked()
    told = {**read_config(settings.EMBEDDED_MODEL), **settings_of}
    monkeypatch.setattr(durations, "read_config", lambda name: told)
    assert re.search(says, first_times(plan))


def test_a_layer_and_the_head_are_timed_for_the_whole_model():
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 260}
    one, many = (
        timing.speed({**tiny, "num_hidden_layers": layers}, dtype="float32", device="cpu")
        for layers in (1, 200)
    )
    assert many.seconds_a_token > 5 * one.seconds_a_token > 0 and min(one.busy, many.busy) >= 1


def test_the_embedded_model_is_known_before_it_is_fetched(tmp_path, monkeypatch):
    here = read_config(settings.EMBEDDED_MODEL)
    monkeypatch.setenv("PFTOOLS_CACHE", str(tmp_path))
    before = read_config(settings.EMBEDDED_MODEL)
    assert before and {name: here[name] for name in before} == before
