"""What a step needs, added up phase by phase: the largest phase counts.

Each phase of a step (load, measure, walk, train, ...) holds some tensors at once. They are counted here as
the code makes them, from the shapes of the model and the settings of the step. Where a step computes on a
GPU, what its tensors take counts there, and what waits beside it counts as memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pftools import run_folder, settings
from pftools.needs.facts import Facts
from pftools.pretrained.model_files import Shapes, adapted_matrices, count, matrices
from pftools.settings import Placement

DeviceKind = Literal["cpu", "cuda"]

_MB = 10**6
# The kernel with torch, transformers and what a step imports besides: measured on a model of a few thousand
# weights.
BASELINE = {
    "calibrate": 680 * _MB,
    "prune": 700 * _MB,
    "finetune": 780 * _MB,
    "evaluate": 760 * _MB,
    "analyse": 690 * _MB,
}
# CUDA's libraries and context: in memory, and on the device. Not measured here.
CUDA_MEMORY, CUDA_DEVICE = 1500 * _MB, 500 * _MB

_FILE = 5e9  # of a safetensors file, of which a large model has several
# What a training holds on a CPU, over what its tensors take: the allocator keeps pieces of what is freed.
_HEAP = 1.2


@dataclass(frozen=True)
class Task:
    """About how much a task reads, for tokenizers of 32,000 words and more.

    Attributes:
        examples: tokens of the examples before a question.
        question: tokens of a question and its answers.
        questions: how many.
        groups: of questions that share their examples.
        new: tokens of a reply that is written; 0: answers are scored.
    """

    examples: int
    question: int
    questions: int
    groups: int = 1
    new: int = 0


# What bounds the forwards of each step, as the modules that read have it.
_TOKENS_A_FORWARD = 4096  # perplexity and training
_QUESTION_TOKENS = {"cpu": 4096, "cuda": 16_384}  # evaluate.reader
_CACHE_BYTES = {"cpu": 2e9, "cuda": 4e9}
_WALK_NUMBERS = {"cpu": 1_000_000, "cuda": 32_000_000}  # prune.inputs
_LOGITS = 50_000_000  # evaluate.block_perplexity
_TASKS = {
    "facts": Task(0, 12, 120),
    "reading": Task(0, 30, 400),
    "mmlu": Task(700, 80, 14_037, groups=57),
    "mmlu_published": Task(700, 80, 14_037, groups=57, new=1),
    "bbh_logical_deduction_five_objects": Task(800, 200, 245),
    "bbh_logical_deduction_five_objects_published": Task(0, 200, 245, new=3),
    "belebele_eng_Latn": Task(0, 200, 895),
    "belebele_eng_Latn_published": Task(1000, 200, 895, new=1),
    "freebaseqa": Task(0, 25, 600, new=32),
    "freebaseqa_published": Task(0, 25, 600, new=50),
}
_OTHER_TASK = Task(700, 80, 5000)
_CHOICES = 4  # answers of a question, each a row
_OBJECTS = 40  # bytes that a token takes in lists of Python, with the text that it came from
_DEFAULT_BLOCKS = 400  # of a whole test split


@dataclass(frozen=True)
class Needs:
    """Bytes at most.

    Attributes:
        memory: of the machine.
        device: of the device's own, 0 on a CPU; of each, where there are several.
        disk: written where runs are.
        scratch: of a file in the user's cache while the step runs.
    """

    memory: int
    device: int
    disk: int
    scratch: int = 0


@dataclass(frozen=True)
class _Phase:
    """Bytes that are held at once: where the step computes, and beside it."""

    computes: float = 0
    waits: float = 0


def needs_of(
    parameters: settings.Step,
    facts: Facts,
    *,
    placement: Placement,
    device_kind: DeviceKind,
    gpus: int = 1,
    resident: int = 0,
) -> Needs:
    """What a step needs.

    Args:
        parameters: of the step.
        facts: of the model that it starts from, or of its base.
        placement: `one` device for the whole model; `spread` over several; `stream`: a layer at a time.
        device_kind: where it computes.
        gpus: how many the model is spread over.
        resident: how many layers of a streamed model stay on a GPU.
    """
    step = _Step(parameters, facts, placement, device_kind, gpus, resident)
    phases = list(step.phases())
    baseline = BASELINE[parameters.step]
    if device_kind == "cpu":
        memory, device = baseline + max(phase.computes + phase.waits for phase in phases), 0.0
    else:
        memory = baseline + CUDA_MEMORY + max(phase.waits for phase in phases)
        device = CUDA_DEVICE + max(phase.computes for phase in phases)
    return Needs(int(memory), int(device), int(step.disk()), int(step.scratch()))


def number_bytes(parameters: settings.Step, facts: Facts, kind: DeviceKind) -> int:
    """Bytes of a number in the format that the step computes in; `auto` as `base_models.resolve_dtype`."""
    dtype = parameters.dtype
    if dtype == "auto" and facts.run_dtype:
        dtype = facts.run_dtype  # type: ignore[assignment]
    if dtype == "auto":
        return 2 if kind == "cuda" or _cpu_has_bf16() else 4
    return 4 if dtype == "float32" else 2


def task_of(name: str) -> Task:
    """How much a task reads; a guess, where it is not one of ours."""
    return _TASKS.get(name, _OTHER_TASK)


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "amx_tile"} & set(flags))


def blocks_of(parameters: Any) -> tuple[int, int]:
    """(blocks, tokens a block) of a step; a prune step that is given a finished calibrate run reads its
    blocks."""
    told = parameters
    if (calibration := getattr(parameters, "calibration", "")) and run_folder.is_finished(calibration):
        told = settings.Calibrate(**run_folder.read_record(calibration)["parameters"])
    return getattr(told, "n_blocks", None) or _DEFAULT_BLOCKS, told.block_length


class _Step:
    """The phases of one step, in bytes."""

    def __init__(
        self,
        parameters: Any,
        facts: Facts,
        placement: Placement,
        kind: DeviceKind,
        gpus: int,
        resident: int,
    ) -> None:
        self.parameters, self.facts, self.placement, self.kind = parameters, facts, placement, kind
        self.gpus = gpus
        self.d = number_bytes(parameters, facts, kind)
        self.per_layer = count(facts.layer)
        self.resident = min(resident * self.per_layer, facts.linear)

    def phases(self) -> Iterator[_Phase]:
        """All phases of the step, each with the model that it holds."""
        yield self._loading()
        yield from getattr(self, f"_{self.parameters.step}")()

    # ------------------------------------------------------------------------------------------------------
    # The model

    def _model(self) -> float:
        """Weights where the step computes: all of them, or a part.

        A streamed model has the matrix in use in memory, and the layer that runs; on a GPU also all that is
        not in layers, and the layers that stay.
        """
        if self.placement == "stream":
            embeddings = self.facts.vocabulary * self.facts.hidden
            outside = self.facts.outside if self.kind == "cuda" else max(0, embeddings - self.per_layer)
            return self.d * (outside + 2 * self.per_layer + self.resident)
        return self.d * self.facts.total / (self.gpus if self.placement == "spread" else 1)

    def _loading(self) -> _Phase:
        """The models, and what is read as it is on disk: a matrix, or a layer; then the masks.

        Where numbers are converted on a CPU, the pages of the file stay mapped until its end. A streamed
        model has only the part in memory that is on its way from one file to the other.
        """
        facts, converts = self.facts, self.facts.stored != self.d
        deltas = facts.linear / 8 if facts.is_run else 0
        read = float(max(facts.largest, facts.vocabulary * facts.hidden))
        if self.placement == "stream":
            part = max(read, self.per_layer) * (facts.stored + (2 * self.d if converts else facts.stored))
            replayed = deltas + facts.largest * self.d
            return _Phase(self._model() if self.kind == "cuda" else 0, max(part, replayed))
        read *= facts.stored + (self.d if converts else 0)
        if self.placement == "one" and self.kind == "cpu" and converts:
            read = max(read, min(facts.stored * facts.total, _FILE))
        return _Phase(self._models() * self._model(), read + deltas)

    # ------------------------------------------------------------------------------------------------------
    # Parts

    def _forward(self, tokens: float) -> float:
        """Activations of a forward without gradients: some of the model's width, some of the MLP's."""
        return tokens * self.d * (6 * self.facts.hidden + 3 * self.facts.widest)

    def _perplexity(self, n_blocks: int, length: int, batch_size: int | None) -> float:
        """A forward of blocks, with logits; their log-softmax is float32, some rows at a time."""
        rows = min(n_blocks, batch_size or max(1, _TOKENS_A_FORWARD // length))
        a_row = length * self.facts.vocabulary
        at_once = min(rows, max(1, _LOGITS // a_row))
        logits = rows * a_row * self.d + at_once * a_row * (8 if self.d == 4 else 10)
        return max(logits, self._forward(rows * length))

    def _held_out(self) -> float:
        parameters = self.parameters
        length = blocks_of(parameters)[1] if parameters.step == "prune" else parameters.block_length
        if not parameters.held_out_blocks:
            return 0
        return self._perplexity(parameters.held_out_blocks, length, parameters.batch_size)

    def _walk_forward(self, n_blocks: int, length: int) -> float:
        """Hidden states of all blocks, and one batch of them in a layer."""
        rows = self.parameters.batch_size or max(
            1, min(n_blocks, _WALK_NUMBERS[self.kind] // (length * self.facts.widest))
        )
        hidden = n_blocks * length * self.facts.hidden * self.d
        return hidden + self._forward(rows * length)

    # ------------------------------------------------------------------------------------------------------
    # Steps

    def _calibrate(self) -> Iterator[_Phase]:
        yield _Phase(self._model() + self._walk_forward(*blocks_of(self.parameters)))

    def _prune(self) -> Iterator[_Phase]:
        parameters, facts = self.parameters, self.facts
        n_blocks, length = blocks_of(parameters)
        model = self._model() * self._models()
        updates = parameters.method in settings.UPDATING_METHODS or parameters.reconstruct_steps
        masks = facts.linear / 8
        yield _Phase(model + self._held_out(), masks)  # after pruning
        kept = self.d * facts.linear if updates and self.placement != "stream" else 0
        streams = 2 if parameters.reconstruct_steps else 1
        walk = (
            self._walk_forward(n_blocks, length) + (streams - 1) * n_blocks * length * facts.hidden * self.d
        )
        work = max(
            self._scores(),
            self._solve() if updates else 0,
            self._mend() if parameters.reconstruct_steps else 0,
        )
        yield _Phase(model + walk + work, masks + self.per_layer + kept)
        # Before sealing, what was written is read again and compared.
        yield _Phase(model + facts.largest * self.d, 2 * masks + self.per_layer + 2 * kept)

    def _scores(self) -> float:
        """Of the matrices that share an input: float32 copies, scores and choices; of one, what is sorted."""
        by_input: dict[tuple[int, bool], int] = {}
        for name, shape in self.facts.layer.items():
            if len(shape) == 2:
                place = (shape[1], "mlp" in name)
                by_input[place] = by_input.get(place, 0) + math.prod(shape)
        group = max([*by_input.values(), self.facts.largest])
        return group * ((4 if self.d < 4 else 0) + 4 + 1) + 8 * self.facts.largest

    def _solve(self) -> float:
        """SparseGPT: second moments of the widest input, its factors, and the weights before and after."""
        return 5 * 4 * self.facts.widest**2 + 4 * 4 * self.facts.largest

    def _mend(self) -> float:
        """Reconstruction: a layer in float32 with gradients and Adam's two moments, and its activations."""
        length = blocks_of(self.parameters)[1]
        return 4 * 4 * self.per_layer + self._kept(max(length, 2048), self.facts.layer, 4)

    def _finetune(self) -> Iterator[_Phase]:
        parameters, facts = self.parameters, self.facts
        adapted = adapted_matrices(facts.shapes, parameters.targets)
        adapter = parameters.rank * sum(sum(shape) for shape in adapted.values())
        tokens = self._rows_a_forward() * parameters.block_length
        yield _Phase(self._model() + self._held_out())
        kept, extra = self._kept(tokens, self._of_a_layer(adapted), self.d), 0.0
        if parameters.gradient_checkpointing:
            extra, kept = facts.layers * tokens * facts.hidden * self.d, kept
        else:
            kept *= facts.layers
        # The float32 copy of the logits, their log-softmax and its gradient.
        loss = tokens * facts.vocabulary * (14 if self.kind == "cuda" and self.d == 2 else 12)
        backward = tokens * self.d * 3 * facts.widest + facts.largest * (2 * self.d + 4)
        at_once = extra + kept + max(loss, backward)
        heap = _HEAP if self.kind == "cpu" and self.placement != "stream" else 1
        computes = self._base() + 16 * adapter + at_once * heap
        yield _Phase(computes, self._plain_beside())
        yield _Phase(self._model() + 12 * adapter + 12 * facts.largest)

    def _base(self) -> float:
        """The frozen weights while they are trained on."""
        parameters, facts = self.parameters, self.facts
        if parameters.base == "plain":
            return self._model()
        rows = sum(shape[0] for shape in matrices(facts.shapes).values() if len(shape) == 2)
        linear = facts.linear * 1.0 + 4 * rows if parameters.base == "8bit" else facts.linear * (0.5 + 4 / 64)
        mask = facts.linear / 8 if facts.is_run else 0
        # A weight that is multiplied with is formed again.
        return linear + mask + self.d * facts.outside + 2 * self.d * facts.largest

    def _plain_beside(self) -> float:
        """The plain weights of a quantized base wait in memory, since the merge goes into them."""
        quantized = self.parameters.base != "plain" and self.placement != "stream"
        return self.d * self.facts.linear if quantized else 0

    def _rows_a_forward(self) -> int:
        """As `finetune.recipe` chooses them: a divisor of a step."""
        parameters = self.parameters
        most = parameters.batch_size or max(1, _TOKENS_A_FORWARD // parameters.block_length)
        step = parameters.blocks_per_step
        return next(rows for rows in range(min(most, step), 0, -1) if step % rows == 0)

    def _of_a_layer(self, adapted: Shapes) -> Shapes:
        return {name: shape for name, shape in self.facts.layer.items() if name in adapted}

    def _kept(self, tokens: float, adapted: Shapes, d: int) -> float:
        """What the backward pass of a layer needs of its forward, in a Llama: bytes.

        Both norms keep their input in float32; attention keeps queries, keys, values and its output; the MLP
        keeps what its activation function and its product are given. A product with an adapted weight keeps
        its input; a frozen one nothing.
        """
        facts = self.facts
        inputs = {name: shape[1] for name, shape in adapted.items()}
        into_attention = any(_in_attention(name) and width == facts.hidden for name, width in inputs.items())
        into_mlp = any(not _in_attention(name) and width == facts.hidden for name, width in inputs.items())
        out_of_mlp = facts.widest in inputs.values()
        own = 2 * facts.queries + 2 * facts.keys
        inner = (3 if facts.gated else 1) + out_of_mlp
        numbers = facts.hidden * (into_attention + into_mlp) + own + inner * facts.widest
        # PEFT's own layers cast their input to float32, each for itself.
        casts = 4 * sum(inputs.values()) if d < 4 and not self._is_masked() else 0
        return tokens * (2 * 4 * facts.hidden + d * numbers + casts)

    def _is_masked(self) -> bool:
        return self.parameters.step == "finetune" and self.parameters.merge != "dense" and self.facts.is_run

    def _evaluate(self) -> Iterator[_Phase]:
        parameters, facts = self.parameters, self.facts
        model, (n_blocks, length) = self._model(), blocks_of(parameters)
        yield _Phase(model + self._perplexity(n_blocks, length, parameters.batch_size))
        yield _Phase(model + length * facts.vocabulary * self.d, 12 * length * facts.vocabulary)
        for name in parameters.tasks:
            yield self._questions(task_of(name))

    def _questions(self, task: Task) -> _Phase:
        """A batch of questions after the cache of their examples, which are read once."""
        parameters, facts = self.parameters, self.facts
        question, questions = task.question + task.new, task.questions
        examples = 0 if parameters.num_fewshot == 0 else task.examples
        asked = min(questions, parameters.limit or questions)
        rows = parameters.batch_size or max(1, _QUESTION_TOKENS[self.kind] // question)
        rows = min(rows, _CHOICES * asked)
        a_token = 2 * facts.keys * facts.layers * self.d
        cached = 0.0
        if examples:
            most = max(1, _CACHE_BYTES[self.kind] // (a_token * (examples + question)))
            rows = min(rows, most)
            cached = rows * (examples + question) * a_token
        logits = 2 * rows * facts.vocabulary * (self.d + 4)
        read = max(rows * question, examples)
        texts = asked * (examples + question) * _OBJECTS
        return _Phase(self._model() + cached + self._forward(read) + logits, texts)

    def _analyse(self) -> Iterator[_Phase]:
        largest = self.facts.largest
        yield _Phase(self._model() + largest * (4 * 3 + 2))
        if self._models() == 2:
            models = 2 * self._model()
            group = max(
                sum(
                    math.prod(shape)
                    for name, shape in self.facts.layer.items()
                    if ("attn" in name) == attention
                )
                for attention in (True, False)
            )
            yield _Phase(models + 19 * group)

    # ------------------------------------------------------------------------------------------------------
    # Disk

    def _models(self) -> int:
        """How many models the step holds at a time."""
        parameters = self.parameters
        if parameters.step == "analyse":
            return 2 if self.facts.is_run or parameters.parent else 1
        return 2 if getattr(parameters, "show_dense_cost", False) else 1

    def scratch(self) -> float:
        """Bytes of the files that hold a streamed model."""
        if self.placement != "stream":
            return 0
        in_file = self.facts.total if self.kind == "cpu" else self.facts.linear - self.resident
        return self._models() * self.d * in_file

    def disk(self) -> float:
        """Bytes that the run keeps, and what a training writes on its way."""
        parameters, facts = self.parameters, self.facts
        notebook = 2 * _MB
        match parameters.step:
            case "calibrate":
                n_blocks, length = blocks_of(parameters)
                columns = sum(shape[-1] for shape in matrices(facts.shapes).values())
                return notebook + 8 * n_blocks * length + 4 * columns
            case "prune":
                updates = parameters.method in settings.UPDATING_METHODS or parameters.reconstruct_steps
                return notebook + facts.linear / 8 + (self.d * facts.linear if updates else 0)
            case "finetune":
                adapted = adapted_matrices(facts.shapes, parameters.targets)
                adapter = parameters.rank * sum(sum(shape) for shape in adapted.values())
                return notebook + 4 * adapter + 2 * 12 * adapter
        return notebook + 3 * _MB


def _in_attention(weight: str) -> bool:
    return "attn" in weight or "attention" in weight
