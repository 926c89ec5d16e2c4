"""What a step needs: estimates from shapes alone, where a step fits, and what would make it fit."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pftools import needs, run_folder, settings
from pftools.errors import PftoolsError
from pftools.needs import resources
from pftools.shipped import DATA
from pftools.study import Study, costs, load_study, plan_study
from tests.tiny import save_tiny

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "dtype": "float16",
}
SEVEN = needs.facts_of_shapes(LLAMA_7B)
GB = 10**9
HUGE = needs.Machine(memory=1000 * GB, total=1000 * GB, gpus=(), disk=1000 * GB, scratch=1000 * GB)
T4 = needs.Machine(memory=12 * GB, total=12 * GB, gpus=(15 * GB,), disk=15 * GB, scratch=70 * GB)
STEPS = list(settings.STEPS.values())


def needed(kind, *, placement="one", device="cpu", facts=SEVEN, **words):
    return needs.needs_of(kind(dtype="float16", **words), facts, placement=placement, device_kind=device)


def test_the_facts_of_llama_7b_are_those_of_its_paper():
    assert round(SEVEN.total / 1e9, 2) == 6.74 and round(SEVEN.linear / 1e9, 2) == 6.48
    assert (SEVEN.layers, SEVEN.hidden, SEVEN.widest, SEVEN.keys, SEVEN.vocabulary) == (
        32,
        4096,
        11008,
        4096,
        32000,
    )


def test_the_facts_of_a_folder_are_read_from_its_files_and_those_of_a_run_from_its_base(tmp_path):
    model = save_tiny(tmp_path / "tiny")
    facts = needs.facts_of(str(model))
    assert (facts.layers, facts.hidden, facts.widest, facts.queries, facts.keys) == (2, 32, 64, 32, 16)
    assert facts.stored == 4 and not facts.is_run
    run = run_folder.start(settings.Prune(model=str(model), runs=str(tmp_path / "runs")))
    pruned = run.seal([], dtype="bfloat16")
    run = run_folder.start(settings.Finetune(model=str(pruned), runs=str(tmp_path / "runs")))
    found = needs.facts_of(str(run.seal([], dtype="bfloat16")))
    assert found == replace(facts, run_dtype="bfloat16", is_run=True)
    assert needs.facts_of("somebody/model-that-is-not-here") is None


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_streaming_needs_less_and_a_gpu_holds_what_a_cpu_would(kind, device):
    less = {"gradient_checkpointing": True} if kind is settings.Finetune else {}
    words = {"model": "somebody/model", **less}
    one, stream = (needed(kind, placement=p, device=device, **words) for p in ("one", "stream"))
    held = "device" if device == "cuda" else "memory"
    assert getattr(one, held) > 2 * SEVEN.total > getattr(stream, held) > 0
    assert one.disk == stream.disk > 0 == one.scratch
    assert stream.scratch == 2 * (SEVEN.linear if device == "cuda" else SEVEN.total)
    assert (one.device > 0) == (device == "cuda")


def test_the_weights_are_there_once_and_twice_where_two_models_are():
    one = needed(settings.Analyse).memory
    pair = needed(settings.Analyse, parent="somebody/model").memory
    assert 0.95 < (pair - one) / (2 * SEVEN.total) < 1.2
    cost = needed(settings.Prune, show_dense_cost=True).memory - needed(settings.Prune).memory
    assert cost == 2 * SEVEN.total
    streamed = needed(settings.Analyse, parent="somebody/model", placement="stream")
    assert streamed.scratch == 2 * 2 * SEVEN.total


def test_a_quantized_base_is_smaller_and_where_it_is_not_streamed_its_plain_weights_wait_beside_it():
    words = {"device": "cuda", "batch_size": 1, "gradient_checkpointing": True}
    eight, four = (
        needed(settings.Finetune, base=base, placement="stream", **words) for base in ("8bit", "nf4")
    )
    assert eight.device - four.device == pytest.approx((1 - 0.5625) * SEVEN.linear, rel=0.02)
    assert four.device < 6 * GB and four.memory < 5 * GB
    plain, waits = (needed(settings.Finetune, base=base, **words) for base in ("plain", "nf4"))
    assert waits.memory - plain.memory == pytest.approx(2 * SEVEN.linear, rel=0.05)
    assert plain.device > waits.device > 2 * SEVEN.total  # it is loaded before it is quantized


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (settings.Calibrate, {"n_blocks": 512}),
        (settings.Prune, {"n_blocks": 512}),
        (settings.Prune, {"method": "sparsegpt"}),
        (settings.Prune, {"reconstruct_steps": 10}),
        (settings.Finetune, {"rank": 256}),
        (settings.Finetune, {"block_length": 2048, "batch_size": 8}),
        (settings.Finetune, {"gradient_checkpointing": False}),
        (settings.Evaluate, {"block_length": 4096, "batch_size": 4}),
        (settings.Evaluate, {"tasks": ["mmlu"], "limit": None}),
        (settings.Evaluate, {"batch_size": 64}),
    ],
)
def test_what_takes_more_is_counted(kind, more):
    base = {"gradient_checkpointing": True} if "gradient_checkpointing" in kind.model_fields else {}
    more = needed(kind, placement="stream", **{**base, **more})
    assert more.memory > needed(kind, placement="stream", **base).memory


def test_checkpointed_activations_are_the_inputs_of_the_layers():
    """LLaMA-7B, 2,048 tokens: about 0.5 GB of inputs where it would be 12 to 20 GB of activations."""
    most, least = (
        needed(settings.Finetune, batch_size=1, block_length=2048, gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert 12 * GB < most.memory - least.memory < 30 * GB


def test_a_prune_step_reads_the_size_of_its_blocks_from_the_calibrate_run(tmp_path):
    words = {"model": "somebody/model", "runs": str(tmp_path)}
    parameters = settings.Calibrate(**words, n_blocks=512, block_length=2048)
    calibration = run_folder.start(parameters).seal([])
    small = needed(settings.Prune, placement="stream", **words).memory
    words["calibration"] = str(calibration)
    assert needed(settings.Prune, placement="stream", **words).memory > small + 6 * GB


def test_the_fastest_placement_that_fits_is_chosen():
    parameters = settings.Evaluate(dtype="float16", batch_size=1, tasks=[])
    assert needs.fitting(parameters, SEVEN, HUGE) == "one"
    assert needs.fitting(parameters, SEVEN, replace(HUGE, memory=8 * GB)) == "stream"
    two = replace(T4, gpus=(12 * GB, 12 * GB))
    assert needs.fitting(parameters, SEVEN, two) == "spread"
    assert needs.fitting(parameters, SEVEN, replace(two, gpus=(12 * GB,))) == "stream"
    on_cpu = parameters.model_copy(update={"device": "cpu"})
    assert needs.fitting(on_cpu, SEVEN, replace(two, memory=100 * GB)) == "one"


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("memory", [4, 8, 16])
@pytest.mark.parametrize("gpus", [(), (6 * GB,), (15 * GB,)])
def test_each_way_out_that_a_shortage_names_is_one(kind, memory, gpus):
    parameters = kind(dtype="float16")
    found = replace(HUGE, memory=memory * GB, gpus=gpus)
    sentence = needs.shortage(parameters, SEVEN, found, "one")
    assert sentence.startswith(f"the {kind.step} step needs about ") and sentence.count(". ") == 0
    fits = re.search(r": (.*) would make it fit", sentence)
    for words in fits[1].split(" or ") if fits else []:
        name, value = words.split(" ")
        where = {"placement": value} if name == "placement" else {"placement": "one"}
        changed = parameters
        if name != "placement":
            changed = settings.check(
                kind, {**parameters.model_dump(), name: json.loads(value) if value != "nf4" else value}
            )
        assert needs.shortage(changed, SEVEN, found, **where) == ""
    assert fits or "saves" in sentence


def test_a_shortage_of_the_disk_is_named_and_nothing_is_said_where_all_fits():
    parameters = settings.Prune(dtype="float16", method="sparsegpt")
    assert needs.shortage(parameters, SEVEN, HUGE) == ""
    assert "13.8 GB of disk (5.0 GB here)" in needs.shortage(parameters, SEVEN, replace(HUGE, disk=5 * GB))


def llama_7b_folder(folder):
    (folder / "config.json").write_text(json.dumps(LLAMA_7B))
    return str(folder)


@pytest.fixture
def here(monkeypatch):
    """Sets how much memory this machine has: `here(20 * GB)`."""

    def have(memory):
        found = replace(HUGE, memory=memory, total=memory)
        monkeypatch.setattr("pftools.needs.advice.machine", lambda runs: found)

    return have


def test_a_notebook_begins_with_both_sides_and_is_refused_where_it_surely_cannot_fit(tmp_path, here):
    words = {"model": llama_7b_folder(tmp_path), "dtype": "float16", "device": "cpu", "runs": str(tmp_path)}
    words["placement"] = "one"
    here(100 * GB)
    (line,) = needs.before(settings.Analyse(**words))
    memory, disk = r"1\d.\d GB of memory \(100.0 GB here\)", r"5 MB of disk \(1000.0 GB here\)"
    assert re.fullmatch(f"needs about {memory}, {disk}", line)
    here(14 * GB)
    line, warning = needs.before(settings.Analyse(**words))
    assert warning.startswith("this may not fit: the analyse step needs about 1")
    here(5 * GB)
    with pytest.raises(PftoolsError, match=r" \(5.0 GB here\): placement stream would make it fit\."):
        needs.before(settings.Analyse(**words))
    here(20 * GB)
    training = settings.Finetune(**words, block_length=2048)
    assert "gradient_checkpointing true" in needs.before(training)[1]  # the step sees to that by itself
    assert needs.before(settings.Analyse(**{**words, "model": "somebody/model-that-is-not-here"})) == []


def planned(tmp_path, **words):
    shape = {name: value for name, value in LLAMA_7B.items() if name != "dtype"}
    study = {"name": "mine", "model": "somebody/model", "orderings": ["P F"], "shape": shape, "analyse": True}
    return plan_study(settings.check(Study, {**study, **words}), runs=tmp_path)


def test_a_plan_tells_what_its_steps_need_beside_what_is_here_and_what_would_help(tmp_path):
    plan = planned(tmp_path, dtype="float16", calibrate={"n_blocks": 128, "block_length": 2048})
    first, *others = costs.says_needs(plan, HUGE)
    found = re.fullmatch(
        r"Memory: calibrate ([\d.]+) GB, prune ([\d.]+) GB, finetune ([\d.]+) GB, evaluate ([\d.]+) GB, "
        r"analyse ([\d.]+) GB; here are 1000.0 GB\.",
        first,
    )
    calibrate, prune, _, _, analyse = (float(number) for number in found.groups())
    assert 13.5 + 2.1 < calibrate < prune and analyse > 2 * 13.5  # two models, since it starts from a run
    assert others == []
    with_auto = costs.says_needs(plan, T4)
    assert len(with_auto) == 2 and "the finetune step needs" in with_auto[1]  # the others are streamed
    plan = planned(tmp_path, dtype="float16", placement="one", calibrate=plan.study.calibrate)
    first, *others = costs.says_needs(plan, T4)
    assert first.endswith("; here are 12.0 GB and 15.0 GB of GPU memory.")
    assert len(others) == 5 and sum("placement stream would" in line for line in others) == 4
    assert "finetune" in others[2] and "placement" not in others[2]  # a GPU does not stream a plain base


def test_a_plan_of_a_model_that_is_not_here_says_nothing_of_memory(tmp_path):
    assert costs.says_needs(planned(tmp_path, shape={}), HUGE) == []


# ------------------------------------------------------------------------------------------------------------
# The machine


def test_the_machine_is_no_larger_than_physical_memory_and_than_what_was_promised(tmp_path, monkeypatch):
    for name in (resources.MEMORY, "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"):
        monkeypatch.delenv(name, raising=False)
    free = needs.machine(tmp_path / "not" / "there")
    assert 0 < free.memory <= free.total and free.disk > 0
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "300")
    assert needs.machine(tmp_path).memory == 300 * 2**20
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert needs.machine(tmp_path).memory == 200 * 2**20
    monkeypatch.setenv(resources.MEMORY, "1e8")
    assert needs.machine(tmp_path).memory == needs.machine(tmp_path).total == 10**8


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "inactive_file 200\n"}, (1000, 500)),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": ""}, None),
        ({}, None),
    ],
)
def test_a_control_group_leaves_its_limit_less_what_is_used_and_not_a_file(tmp_path, files, wanted):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert resources._limit(tmp_path, "memory.max", "memory.current", "inactive_file") == wanted


_FREES = """
import numpy, psutil, sys
from pftools.needs import resources
if sys.argv[1] == "give":
    resources.give_back_freed()
for _ in range(2):
    del_me = numpy.ones(30 * 2**17)  # what glibc learns from: such sizes come again
    del del_me
kept = [numpy.ones(2**19) for _ in range(100)]
del kept[::2]
print(psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_goes_back_where_memory_is_short():
    keeping, giving = (
        int(subprocess.run([sys.executable, "-c", _FREES, word], capture_output=True, check=True).stdout)
        for word in ("keep", "give")
    )
    assert keeping - giving > 40 * 2**22 / 1.5


def test_only_visible_gpus_count(monkeypatch):
    told = "0, GPU-aa, 15000\n1, GPU-bb, 8000\n"
    monkeypatch.setattr(resources.shutil, "which", lambda name: name)
    monkeypatch.setattr(resources.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told))
    assert resources._gpus(None) == (15000 * 2**20, 8000 * 2**20)
    assert resources._gpus("1") == resources._gpus("GPU-bb") == (8000 * 2**20,)
    assert resources._gpus("") == ()


def test_auto_is_a_gpu_where_there_is_one():
    assert needs.device_kind("auto", T4) == needs.device_kind("cuda:1", T4) == "cuda"
    assert needs.device_kind("auto", HUGE) == needs.device_kind("cpu", T4) == "cpu"


# ------------------------------------------------------------------------------------------------------------
# On paper: a device that is not here

ON_T4 = needs.DEVICES["t4"]


def shipped(name, runs):
    return plan_study(load_study(DATA / f"studies/{name}.yaml"), runs=runs)


@pytest.mark.parametrize("name", ["colab_t4", "published"])
def test_the_tables_of_the_documentation_are_what_the_plan_says(name, tmp_path):
    lines = costs.paper_lines(shipped(name, tmp_path), ON_T4)
    page = (DATA.parent / "docs/colab.md").read_text()
    assert "\n".join(lines) in page, "write into docs/colab.md what `pftools plan STUDY --on t4` prints"


def test_the_study_for_colab_fits_a_free_session(tmp_path):
    rows = costs.on_paper(shipped("colab_t4", tmp_path), ON_T4)
    assert sum(row["hours"] for row in rows) < 0.8 * ON_T4.session_hours
    for row in rows:
        assert row["placement"] == "stream" and row["gpu"] < 14 * GB and row["memory"] < 10 * GB
        assert row["scratch"] < ON_T4.machine.scratch
    assert not any("would make it fit" in row["note"] for row in rows)


def seconds(kind, placement="one", **words):
    return needs.seconds_on(ON_T4, kind(dtype="float16", **words), SEVEN, placement)


def test_a_training_takes_its_operations_at_a_third_of_the_datasheet():
    words = {"base": "nf4", "gradient_checkpointing": True, "held_out_blocks": 0}
    more = seconds(settings.Finetune, **words, tokens=2_000_000) - seconds(
        settings.Finetune, **words, tokens=1_000_000
    )
    assert more == pytest.approx(3 * 1e6 * 2 * SEVEN.total / (0.35 * 65e12), rel=0.05)
    padded = seconds(settings.Finetune, **words, tokens=100_000, packing=False, block_length=2048)
    assert padded > 10 * (seconds(settings.Finetune, **words, tokens=100_000, block_length=2048) - 100)


def test_a_streamed_model_reads_its_weights_for_each_forward():
    words = {"tasks": [], "block_length": 2048, "batch_size": 1}
    few = replace(ON_T4, machine=replace(ON_T4.machine, gpus=(4 * GB,)))
    more, less = (
        needs.seconds_on(few, settings.Evaluate(dtype="float16", **words, n_blocks=n), SEVEN, "stream")
        for n in (20, 10)
    )
    assert needs.resident_layers(settings.Evaluate(**words), SEVEN, few.machine, "stream") == 2
    assert more - less == pytest.approx(10 * 2 * SEVEN.linear * 30 / 32 / 200e6, rel=0.05)
    more -= less
    whole = seconds(settings.Evaluate, **words, n_blocks=20) - seconds(
        settings.Evaluate, **words, n_blocks=10
    )
    assert whole < more / 20


@pytest.mark.parametrize("room", [4, 8, 12, 15, 40])
def test_as_many_layers_of_a_streamed_evaluation_stay_on_the_gpu_as_fit(room):
    found = replace(ON_T4.machine, gpus=(room * GB,))
    parameters = settings.Evaluate(dtype="float16", tasks=["mmlu"])
    stay, a_layer = needs.resident_layers(parameters, SEVEN, found, "stream"), 2 * SEVEN.linear / 32
    told = needs.on(found, parameters, SEVEN, "stream")
    assert told.scratch == 2 * SEVEN.linear - stay * a_layer
    if stay < 32:
        assert (told.device <= 0.9 * room * GB < told.device + a_layer) or stay == 0
    assert stay == {4: 0, 8: 3, 12: 12, 15: 19, 40: 32}[room]
    for other in (settings.Prune(), settings.Finetune(), settings.Analyse()):
        assert needs.resident_layers(other, SEVEN, found, "stream") == 0
    assert needs.resident_layers(parameters, SEVEN, replace(found, gpus=()), "stream") == 0


def test_a_step_that_does_not_fit_goes_on_with_the_largest_batch_that_does():
    words = {"dtype": "float16", "base": "nf4", "block_length": 2048, "blocks_per_step": 8}
    parameters = settings.Finetune(**words, batch_size=4)
    goes_on = needs.as_it_goes_on(parameters, SEVEN, ON_T4.machine, "stream")
    assert goes_on == parameters.model_copy(update={"batch_size": 1, "gradient_checkpointing": True})
    fits = parameters.model_copy(update={"gradient_checkpointing": True, "batch_size": 8})
    assert needs.as_it_goes_on(fits, SEVEN, ON_T4.machine, "stream").batch_size == 4
    assert needs.as_it_goes_on(fits, SEVEN, replace(ON_T4.machine, gpus=(80 * GB,)), "stream") == fits


def test_a_gpu_does_not_stream_a_plain_base_and_nf4_with_a_streamed_model_is_the_way_out():
    parameters = settings.Finetune(dtype="float16", batch_size=1, gradient_checkpointing=True)
    found = replace(ON_T4.machine, gpus=(8 * GB,))
    assert needs.fitting(parameters, SEVEN, found) == "one"
    assert "base nf4 would make it fit" in needs.shortage(parameters, SEVEN, found)
    assert needs.fitting(parameters.model_copy(update={"base": "nf4"}), SEVEN, found) == "stream"
