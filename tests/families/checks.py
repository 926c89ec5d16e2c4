"""What is asked of every class, one small function each: exact, plain, refused in a sentence, wrong, or a
traceback.

exact     the same as the slowest honest way of computing it
plain     the same, and computed that slow way, as the product says
refused   a PftoolsError, before anything was computed
WRONG     another number than the honest one
TRACEBACK any other exception
upstream  transformers itself cannot do it with this class, so that there is nothing to compare with
"""

from __future__ import annotations

import copy
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from pftools import adapters, checkpoints, layers, models, run_folder, settings
from pftools.errors import PftoolsError
from pftools.evaluate import PrefixCachedLM, perplexity
from pftools.finetune import finetune_model
from pftools.masks import load_masks
from pftools.pretrained import streamed
from pftools.pretrained.loading import load_pretrained
from pftools.prune import prune_checkpoint, prune_model
from tests.families import oracle, zoo
from tests.tiny import tiny_tokenizer


@dataclass(frozen=True)
class Outcome:
    """What came of a check. says: the sentence of a refusal, or what is wrong."""

    status: str
    says: str = ""


class Wrong(AssertionError):
    """A number that is not the honest one."""


class Upstream(Exception):
    """Transformers itself does not do what the check compares with."""


def require(condition: Any, says: str) -> None:
    """Raise `Wrong` where the condition does not hold."""
    if not condition:
        raise Wrong(says)


def run(check: Callable[[str], str | None], kind: str) -> Outcome:
    """The outcome of one check of one model type; nothing is raised."""
    try:
        return Outcome(check(kind) or "exact")
    except PftoolsError as error:
        return Outcome("refused", str(error))
    except Wrong as error:
        return Outcome("WRONG", str(error))
    except Upstream as error:
        return Outcome("upstream", str(error))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/pftools/" in frame.filename or "/tests/" in frame.filename]
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(own[-4:]))
        message = " ".join(str(error).split())[:300]
        return Outcome("TRACEBACK", f"{type(error).__name__}: {message} ({places})")


# ------------------------------------------------------------------------------------------------------------
# What the checks read


def blocks(n_blocks: int = 8, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random tokens, (n_blocks, length), none of them special; longer than the sliding window."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (n_blocks, length), generator=generator)


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """(rows, length, vocabulary), the model's own."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two tensors differ by rounding only."""
    return one.shape == other.shape and bool(
        (one - other).abs().max() <= tolerance * other.abs().max().clamp_min(1)
    )


def looks_ahead(model: nn.Module) -> bool:
    """Whether logits depend on later tokens, as an encoder's do."""
    one = blocks(1, 16)
    other = one.clone()
    other[0, -1] = other[0, -1] % 255 + 1
    return not close(logits(model, one)[:, :-1], logits(model, other)[:, :-1])


def text_decoder(model: nn.Module) -> str:
    """The name of the list of decoder layers: as long as the text configuration says, and the largest such
    list."""
    config = model.config.get_text_config(decoder=True)
    depth = {
        getattr(config, name, None)
        for name in ("num_hidden_layers", "decoder_layers", "num_layers", "n_layer")
    }
    lists = {
        name: sum(weight.numel() for weight in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) in depth
        and not any(word in name for word in ("vision", "audio", "visual", "image"))
    }
    require(lists, "it was pruned, and has no list of as many layers as its configuration says")
    return max(lists, key=lambda name: lists[name])


# ------------------------------------------------------------------------------------------------------------
# Pruning


def masks_equal_naive_wanda(kind: str) -> None:
    """Masks are those of the naive walk that runs the real model, and no matrix of the decoder is left out
    without a word."""
    model, tokens = zoo.build(kind), blocks()
    pruned = copy.deepcopy(model)
    masks = prune_model(pruned, tokens, batch_size=3, progress=False).masks
    require(not looks_ahead(model), "an encoder was accepted")
    prefix = text_decoder(model)
    naive = oracle.wanda(model, prefix, tokens, 3, masks)
    compared = differing = 0
    for name, mask in masks.items():
        require(name in dict(model.named_parameters()), f"{name} is no parameter of the model")
        if name in naive.masks:
            sure = ~naive.unsure[name]
            compared += int(sure.sum())
            differing += int((mask != naive.masks[name])[sure].sum())
        require(
            bool(((pruned.get_parameter(name) == 0) == ~mask).all()), f"the zeros of {name} are not its mask"
        )
    require(differing == 0, f"{differing} of {compared} mask bits differ from the naive walk")
    require(compared > 0.5 * sum(mask.numel() for mask in masks.values()), "too little could be compared")
    left = naive.left - set(uncounted(model))
    require(not left, f"neither pruned nor named: {', '.join(sorted(left)[:3])}")


def uncounted(model: nn.Module) -> list[str]:
    """The matrices that the product knows and states not to count, such as routers."""
    return list(layers.uncounted_weights(model)) if hasattr(layers, "uncounted_weights") else []


def order_of_blocks_does_not_matter(kind: str) -> None:
    """The same blocks in another order, in batches of another size, give the same masks."""
    tokens = blocks()
    one = prune_model(zoo.build(kind), tokens, batch_size=3, progress=False).masks
    other = prune_model(zoo.build(kind), tokens.flip(0), batch_size=2, progress=False).masks
    require(list(one) == list(other), "other weights were pruned")
    differing = sum(int((one[name] != other[name]).sum()) for name in one)
    size = sum(mask.numel() for mask in one.values())
    require(differing <= 1e-3 * size, f"{differing} of {size} mask bits depend on the order of the blocks")


def from_disk_equals_in_memory(kind: str) -> None:
    """`prune_checkpoint` gives the masks of `prune_model`, and writes a model with the same logits."""
    tokens = blocks()
    with tempfile.TemporaryDirectory() as folder:
        source, model = saved(kind, Path(folder) / "source")
        masks = prune_model(model, tokens, batch_size=3, progress=False).masks
        written = Path(folder) / "pruned"
        prune_checkpoint(source, tokens, written, batch_size=3, dtype="float32", device="cpu", progress=False)
        stored = load_masks(written / "masks.safetensors")
        require(set(stored) == set(masks), "other weights were pruned from disk")
        differing = sum(int((stored[name] != masks[name]).sum()) for name in masks)
        require(differing == 0, f"{differing} mask bits differ from those in memory")
        again = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
        off = float((logits(again, tokens) - logits(model, tokens)).abs().max())
        require(
            close(logits(again, tokens), logits(model, tokens)),
            f"logits of the written model are off by {off:.2g}",
        )


def streamed_equals_in_memory(kind: str) -> None:
    """A model that is streamed from a scratch file has the logits of the loaded one, and gets its masks."""
    tokens = blocks(4)
    with tempfile.TemporaryDirectory() as folder, patch.object(streamed, "_LEAST", 1):
        source, _ = saved(kind, Path(folder) / "source")
        options = {"dtype": "float32", "device": "cpu"}
        plain, _ = load_pretrained(str(source), **options)
        other, _ = load_pretrained(str(source), placement="stream", **options)
        require(close(logits(other, tokens), logits(plain, tokens)), "the streamed model has other logits")
        one, two = (
            prune_model(model, tokens, batch_size=2, progress=False).masks for model in (plain, other)
        )
        require(list(one) == list(two), "other weights of the streamed model were pruned")
        differing = sum(int((one[name] != two[name]).sum()) for name in one)
        require(differing == 0, f"{differing} mask bits of the streamed model differ")


def saved(kind: str, folder: Path) -> tuple[Path, nn.Module]:
    """A model as a folder, and as transformers itself reads it again; both have to be the same model."""
    model = zoo.build(kind)
    tokens = blocks(2)
    try:
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        again.set_experts_implementation("eager")
    except Exception as error:
        raise Upstream(
            f"save_pretrained and from_pretrained: {type(error).__name__}: {str(error)[:150]}"
        ) from error
    if not close(logits(again, tokens), logits(model, tokens)):
        raise Upstream("a model saved and read again by transformers has other logits")
    return folder, again


def export_reloads(kind: str) -> None:
    """The exported folder of a pruned and fine-tuned run is read by plain transformers, with equal logits."""
    tokens = blocks()
    with tempfile.TemporaryDirectory() as folder:
        source, _ = saved(kind, Path(folder) / "source")
        parameters = settings.Prune(
            model=str(source), dtype="float32", device="cpu", runs=str(Path(folder) / "runs")
        )
        run = run_folder.start(parameters)
        model, _ = models.load_for(parameters)
        masks = prune_model(model, tokens, batch_size=3, progress=False).masks
        sealed = run.seal(checkpoints.save_prune(run, masks), measured=0.5, dtype="float32")
        exported = checkpoints.export(sealed, Path(folder) / "exported", dtype="float32", device="cpu")
        again = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
        require(close(logits(again, tokens), logits(model, tokens)), "logits of the exported model differ")


# ------------------------------------------------------------------------------------------------------------
# Fine-tuning


class _LossAtTheEnd(TrainerCallback):
    """The loss of the trained model on given tokens, as the training itself computes it."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self.loss = tokens, 0.0

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.eval()
        with torch.no_grad():
            self.loss = loss_of(model, self.tokens)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> float:
    """Mean loss a token."""
    found = logits(model, tokens)
    return float(nn.functional.cross_entropy(found[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()))


def masked_adapters_keep_zeros(kind: str) -> None:
    """After a masked training, every zero is one still, the merged model has the trained loss, and it is
    another than before."""
    tokens = blocks()
    model = zoo.build(kind)
    prune_model(model, tokens, batch_size=3, progress=False)
    zeros = {name: weight == 0 for name, weight in layers.linear_weights(model).items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    watch = _LossAtTheEnd(tokens)
    before = loss_of(model, tokens)
    trained = finetune_model(
        model, tokens, rank=4, learning_rate=1e-2, steps=3, warmup_steps=0, progress=False, callbacks=[watch]
    )
    same = all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    require(same and list(state) == list(model.state_dict()), "the model was changed by the training")
    adapters.merge_adapter(model, trained.adapter)
    for name, weight in layers.linear_weights(model).items():
        require(torch.equal(weight == 0, zeros[name]), f"the zeros of {name} have changed")
    merged = loss_of(model, tokens)
    require(
        abs(merged - watch.loss) <= 1e-4,
        f"the merged loss is {merged:.5f} and the trained one {watch.loss:.5f}",
    )
    require(merged != before, "the training changed nothing")


def a_quantized_base_keeps_zeros(kind: str) -> None:
    """Training on an 8-bit and on an NF4 base: every zero is one still, and the update arrives."""
    tokens = blocks(4)
    for base in ("8bit", "nf4"):
        model = zoo.build(kind)
        prune_model(model, tokens, batch_size=3, progress=False)
        before = {name: weight.clone() for name, weight in layers.linear_weights(model).items()}
        trained = finetune_model(
            model, tokens, rank=4, learning_rate=1e-2, steps=2, base=base, progress=False
        )
        require(bool(trained.losses["loss"].notna().all()), f"{base}: the loss is not a number")
        adapters.merge_adapter(model, trained.adapter)
        after = layers.linear_weights(model)
        for name, weight in after.items():
            require(torch.equal(weight == 0, before[name] == 0), f"{base}: the zeros of {name} have changed")
        require(
            any(not torch.equal(after[name], before[name]) for name in after), f"{base}: nothing was trained"
        )


def gradient_checkpointing_changes_nothing(kind: str) -> None:
    """The same losses with recomputed activations."""
    tokens = blocks(4)
    model = zoo.build(kind)
    options: dict[str, Any] = {"rank": 4, "steps": 2, "progress": False}
    plain = finetune_model(model, tokens, **options).losses["loss"]
    less = finetune_model(model, tokens, gradient_checkpointing=True, **options).losses["loss"]
    require(float((plain - less).abs().max()) <= 1e-4, "gradient checkpointing changes the losses")


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# Longer than what the families keep of a sliding window, shorter than their context.
_SHARED = "Abacus, badger, cedar; delta echo, fox. "
_QUESTIONS = [
    f"{_SHARED}{text} {number}?"
    for text in ("What is it", "Who", "Name the one at", "Last of all")
    for number in range(5)
]


def likelihoods_equal_hflm(kind: str) -> str:
    """Log-likelihoods with shared beginnings, and of a prompt beyond the context, are lm-eval's to 1e-3."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = zoo.build(kind)
    pairs = [(question, f" {answer}") for question in _QUESTIONS for answer in ("yes", "no", "a fox")]
    pairs += [("Alone.", " yes"), (_SHARED * 4, " long")]
    lm, answers = _asked(model, pairs)
    reference = HFLM(
        pretrained=model,
        tokenizer=tiny_tokenizer(),
        batch_size=1,
        max_length=zoo.CONTEXT,
        backend="causal",
    )
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    expected = reference.loglikelihood(requests, disable_tqdm=True)
    off = max(abs(one[0] - other[0]) for one, other in zip(answers, expected))
    require(off <= 1e-3, f"log-likelihoods are off by {off:.2g} nats")
    return {"shared": "exact", "plain": "plain"}[lm.shared_beginnings()["shared_beginnings"]]


def _asked(model: nn.Module, pairs: list[tuple[str, str]]) -> tuple[PrefixCachedLM, list[tuple[float, bool]]]:
    from lm_eval.api.instance import Instance

    lm = PrefixCachedLM(pretrained=model, tokenizer=tiny_tokenizer(), progress=False, max_length=zoo.CONTEXT)
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    return lm, lm.loglikelihood(requests, disable_tqdm=True)


def greedy_texts_equal_a_loop(kind: str) -> None:
    """Greedy replies are those of a loop that reads everything anew for every token, without a cache.

    Every third reply is compared, and that to the longest prompt."""
    from lm_eval.api.instance import Instance

    model, tokenizer, most = zoo.build(kind), tiny_tokenizer(), 8
    prompts = [*_QUESTIONS, _SHARED * 4]
    lm = PrefixCachedLM(pretrained=model, tokenizer=tokenizer, progress=False, max_length=zoo.CONTEXT)
    options = {"until": ["<never>"], "max_gen_toks": most, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (prompt, options), place) for place, prompt in enumerate(prompts)
    ]
    replies = lm.generate_until(requests, disable_tqdm=True)
    for place in {*range(0, len(prompts), 3), len(prompts) - 1}:
        prompt, reply = prompts[place], replies[place]
        tokens = tokenizer(prompt)["input_ids"][-(zoo.CONTEXT - most) :]
        written: list[int] = []
        for _ in range(most):
            last = logits(model, torch.tensor([tokens + written]))[0, -1]
            best = last.topk(2)
            if best.values[0] - best.values[1] < 1e-4:
                break  # a tie, which rounding decides
            written.append(int(best.indices[0]))
            if written[-1] == tokenizer.eos_token_id:
                break
        expected = tokenizer.decode(written, skip_special_tokens=True)
        if len(written) < most and tokenizer.eos_token_id not in written:
            expected, reply = (text[: len(expected.rstrip("\ufffd"))] for text in (expected, reply))
        require(reply == expected, f"a greedy reply is {reply!r} where the model itself writes {expected!r}")


def perplexity_is_the_models_own(kind: str) -> None:
    """The loss of blocks, one by one; and blocks beyond the context are refused, or read as the model reads
    them."""
    model, tokens = zoo.build(kind), blocks(3, 40)
    found = perplexity(model, tokens, batch_size=2, progress=False).block_nll
    for block, loss in zip(tokens, found):
        off = abs(float(loss) - loss_of(model, block[None]))
        require(off <= 1e-4, f"the loss of a block is off by {off:.2g}")
    require(not looks_ahead(model), "an encoder was accepted")


CHECKS: dict[str, Callable[[str], str | None]] = {
    "prune": masks_equal_naive_wanda,
    "order": order_of_blocks_does_not_matter,
    "disk": from_disk_equals_in_memory,
    "stream": streamed_equals_in_memory,
    "adapt": masked_adapters_keep_zeros,
    "quantized": a_quantized_base_keeps_zeros,
    "checkpointing": gradient_checkpointing_changes_nothing,
    "export": export_reloads,
    "likelihoods": likelihoods_equal_hflm,
    "greedy": greedy_texts_equal_a_loop,
    "perplexity": perplexity_is_the_models_own,
}
