"""When memory runs out, the work goes on in smaller pieces, with the same results, and the run says so."""

import pytest
import torch

from pftools import layers, memory, models, run_folder, settings
from pftools.errors import PftoolsError
from pftools.evaluate import evaluate_tasks, perplexity
from pftools.finetune import finetune_model
from pftools.prune import measure_activations, prune_checkpoint, prune_model
from tests.tiny import save_tiny, tiny_blocks, tiny_llama, tiny_tokenizer

FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:73] . DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.fixture(autouse=True)
def nothing_said_before():
    memory.relieved()


def with_little_memory(model, rows, failure=FAILURES[0]):
    """A model of which no layer reads more than so many rows at a time."""

    def refuse(mlp, args):
        if len(args[0]) > rows:
            raise failure

    for layer in layers.decoder_layers(model)[1]:
        layer.mlp.register_forward_pre_hook(refuse)
    return model


@pytest.mark.parametrize("failure", FAILURES, ids=["cuda", "cpu", "python"])
def test_pruning_goes_on_with_smaller_batches(failure):
    expected = prune_model(tiny_llama(), tiny_blocks(), batch_size=2, progress=False)
    model = with_little_memory(tiny_llama(), 2, failure)
    found = prune_model(model, tiny_blocks(), batch_size=8, progress=False)
    assert all(torch.equal(found.masks[name], expected.masks[name]) for name in expected.masks)
    assert memory.relieved() == ["calibration blocks were read 2 at a time"]
    assert memory.relieved() == []


@pytest.mark.parametrize(
    "options", [{"inputs": "dense"}, {"allocation": "owl"}, {"reconstruct_steps": 2}], ids=str
)
def test_every_walk_begins_again(options):
    expected = prune_model(tiny_llama(), tiny_blocks(), batch_size=2, progress=False, **options)
    model = with_little_memory(tiny_llama(), 2)
    found = prune_model(model, tiny_blocks(), batch_size=4, progress=False, **options)
    assert all(torch.equal(found.masks[name], expected.masks[name]) for name in expected.masks)
    assert memory.relieved() == ["calibration blocks were read 2 at a time"]


def test_pruning_from_disk_and_measuring_go_on(tmp_path, monkeypatch):
    from pftools.prune import inputs, walk

    real = inputs.run_layer

    def run_layer(layer, index, batches, **options):
        if len(batches[0].hidden) > 2:
            raise FAILURES[0]
        real(layer, index, batches, **options)

    monkeypatch.setattr(walk, "run_layer", run_layer)
    folder = save_tiny(tmp_path / "tiny")
    prune_checkpoint(folder, tiny_blocks(), tmp_path / "pruned", batch_size=4, device="cpu", progress=False)
    assert (tmp_path / "pruned" / "model.safetensors.index.json").exists() and memory.relieved()
    norms = measure_activations(tiny_llama(), tiny_blocks(), batch_size=4, progress=False).norms
    monkeypatch.undo()
    expected = measure_activations(tiny_llama(), tiny_blocks(), batch_size=2, progress=False).norms
    assert all(torch.equal(norms[name], expected[name]) for name in expected) and memory.relieved()


def test_what_cannot_get_smaller_says_what_to_lower():
    with pytest.raises(PftoolsError, match="out of memory at model.layers.0 with batch_size 2"):
        prune_model(with_little_memory(tiny_llama(), 0), tiny_blocks(), batch_size=2, progress=False)
    with pytest.raises(PftoolsError, match="one row of blocks of the perplexity does not fit"):
        perplexity(with_little_memory(tiny_llama(), 0), tiny_blocks(4, 2), progress=False)


def test_losses_do_not_depend_on_the_batch():
    expected = perplexity(tiny_llama(), tiny_blocks(), batch_size=1, progress=False).block_nll
    model = with_little_memory(tiny_llama(), 3)
    found = perplexity(model, tiny_blocks(), batch_size=8, progress=False).block_nll
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert memory.relieved()[-1] == "blocks of the perplexity were read 2 at a time"


def test_what_fitted_is_kept_for_the_batches_that_follow():
    calls = []

    def work(batch):
        calls.append(len(batch))
        if len(batch) > 2:
            raise FAILURES[0]
        return list(batch)

    answers = [memory.in_halves(work, list(range(8)), of="rows") for _ in range(3)]
    assert answers == [list(range(8))] * 3 and calls[:3] == [8, 4, 2] and set(calls[3:]) == {2}
    assert memory.relieved() == ["rows were read 2 at a time"]


def test_questions_are_read_in_smaller_batches():
    asked = {"tasks": ["facts"], "limit": 6, "progress": False}
    expected = evaluate_tasks(tiny_llama(), tiny_tokenizer(), **asked).samples
    found = evaluate_tasks(with_little_memory(tiny_llama(), 4), tiny_tokenizer(), **asked).samples
    assert found["correct"].tolist() == expected["correct"].tolist()
    assert memory.relieved()


def test_training_goes_on_with_fewer_rows_and_then_with_gradient_checkpointing(monkeypatch):
    asked = {"steps": 3, "rank": 2, "blocks_per_step": 4, "progress": False}
    expected = finetune_model(tiny_llama(), tiny_blocks(), micro_batch_size=1, **asked)
    model = tiny_llama()

    def refuse(network, args, kwargs):
        rows = len(kwargs["input_ids"])
        checkpoints = getattr(model.model, "gradient_checkpointing", False)
        if network.training and torch.is_grad_enabled() and (rows > 1 or not checkpoints):
            raise FAILURES[1]

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    found = finetune_model(model, tiny_blocks(), **asked)
    assert found.losses["loss"].tolist() == pytest.approx(expected.losses["loss"].tolist(), rel=1e-5)
    assert memory.relieved() == [
        "rows of the training were read 1 at a time",
        "gradient checkpointing was switched on",
    ]


def test_a_run_says_what_was_made_smaller(tmp_path):
    memory.relieve("something of a run that was given up")
    parameters = settings.Evaluate(
        model=str(save_tiny(tmp_path / "tiny")), dtype="float32", runs=str(tmp_path / "runs")
    )
    run = run_folder.start(parameters)
    network, _ = models.load_for(parameters)
    perplexity(with_little_memory(network, 4), tiny_blocks(), progress=False)
    folder = run.seal([])
    assert run_folder.read_record(folder)["relieved"] == ["blocks of the perplexity were read 4 at a time"]
