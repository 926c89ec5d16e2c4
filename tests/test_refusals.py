"""What cannot be worked on is told by `pftools plan` in one sentence, before anything is computed; and models
that are in memory already are judged by what they compute."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from pftools import evaluate, finetune, layers, prune
from pftools.cli import app
from pftools.errors import PftoolsError
from pftools.pretrained import loading
from tests.tiny import save_tiny, tiny_blocks, tiny_llama, tiny_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def plan(folder, tmp_path, more=""):
    """`pftools plan` of a study of the model in a folder; what it raises is printed by the command."""
    study = tmp_path / "mine.yaml"
    study.write_text(
        f"orderings: [P, P F]\nmodel: {folder}\n{more}calibrate: {{block_length: 16}}\n"
        f"finetune: {{block_length: 16}}\nevaluate: {{block_length: 16, tasks: []}}\n"
    )
    return CliRunner().invoke(app, ["plan", str(study), "--runs", str(tmp_path / "runs")])


def edited(folder, **changes):
    """A folder whose config.json says something else."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def encoder(folder):
    BertForMaskedLM(BertConfig(vocab_size=260, **SIZES)).save_pretrained(folder)


def half(folder):
    config = BartConfig(vocab_size=260, d_model=32, encoder_layers=1, decoder_layers=1, decoder_ffn_dim=64)
    BartForCausalLM(config).save_pretrained(folder)
    edited(folder, is_encoder_decoder=True)


def quantized(**settings):
    def make(folder):
        save_tiny(folder)
        edited(folder, quantization_config=settings)

    return make


def quantized_of_old(name):
    def make(folder):
        save_tiny(folder)
        (folder / name).write_text(json.dumps({"bits": 4, "group_size": 128}))

    return make


def shared_block(folder):
    """One block that two layers share, so that neither owns it."""
    from tests.families import zoo

    zoo.build("zamba2").save_pretrained(folder)


def vision(folder):
    ViTForImageClassification(ViTConfig(image_size=32, **SIZES)).save_pretrained(folder)


def no_weights(folder):
    save_tiny(folder)
    (folder / "model.safetensors").unlink()


def own_code(folder):
    save_tiny(folder)
    edited(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})


def unheard_of(folder):
    save_tiny(folder)
    edited(folder, model_type="model-of-next-year")


def short_context(folder):
    save_tiny(folder, max_position_embeddings=8)


REFUSED = {
    "encoder": (encoder, "is an encoder, which sees later tokens"),
    "half of an encoder-decoder": (half, "only half of a model"),
    "8 bit": (quantized(quant_method="bitsandbytes", load_in_8bit=True), r"quantized weights \(bitsandbytes"),
    "NF4": (quantized(quant_method="bitsandbytes", load_in_4bit=True), r"quantized weights \(bitsandbytes"),
    "GPTQ": (quantized(quant_method="gptq", bits=4), r"quantized weights \(gptq"),
    "AWQ": (quantized(quant_method="awq", bits=4), r"quantized weights \(awq"),
    "GPTQ of old": (quantized_of_old("quantize_config.json"), r"quantized weights \(quantize_config.json"),
    "AWQ of old": (quantized_of_old("quant_config.json"), r"quantized weights \(quant_config.json"),
    "a block of two layers": (shared_block, "cannot be pruned .*share"),
    "vision only": (vision, "is of type vit, which is no causal language model"),
    "no weights": (no_weights, "no weights"),
    "code of its own": (own_code, "runs code of its own, and trust_remote_code is not set"),
    "a type of later": (unheard_of, "of type model-of-next-year, which the installed transformers does not"),
    "beyond the context": (short_context, "longer than the 8 that"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_plan_refuses_each_kind_in_one_sentence(tmp_path, kind):
    make, says = REFUSED[kind]
    make(tmp_path / "model")
    found = plan(tmp_path / "model", tmp_path).exception
    assert isinstance(found, PftoolsError), found
    assert re.search(says, str(found)) and re.match(r".*mine.yaml, line \d", str(found)), found
    assert "\n" not in str(found)
    assert not list((tmp_path / "runs").glob("*")), "something was computed"


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind not in ("beyond the context",)])
def test_loading_refuses_what_plan_refuses(tmp_path, kind):
    make, says = REFUSED[kind]
    make(tmp_path / "model")
    if kind == "a block of two layers":
        pytest.skip("it can be evaluated; only pruning refuses it")
    with pytest.raises(PftoolsError, match=says):
        loading.load_pretrained(str(tmp_path / "model"))


def in_shards(folder):
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    return sorted(folder.glob("model-*.safetensors"))


def adapter(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def adapter_beside_a_config(folder):
    save_tiny(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def rewritten(change):
    """A folder whose weights are others."""

    def make(folder):
        path = save_tiny(folder) / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return make


def eight_bits(weights):
    return {
        name: (weight * 9).to(torch.int8) if "proj" in name else weight for name, weight in weights.items()
    }


def renamed(weights):
    return {f"base_model.model.{name}": weight for name, weight in weights.items()}


def edits(**changes):
    def make(folder):
        edited(save_tiny(folder), **changes)

    return make


def writes(name, text):
    def make(folder):
        (save_tiny(folder) / name).write_text(text)

    return make


BROKEN = {
    "a shard is missing": (
        lambda folder: in_shards(folder)[1].unlink(),
        "lacks the file model-00002-of-0000",
    ),
    "an adapter": (adapter, "is an adapter of PEFT and no whole model"),
    "an adapter and a config": (adapter_beside_a_config, "is an adapter of PEFT and no whole model"),
    "whole numbers": (rewritten(eight_bits), "quantized weights .*down_proj.weight is I8"),
    "other names": (rewritten(renamed), "is not whole .*lack lm_head.weight and 20 others"),
    "more layers than files": (edits(num_hidden_layers=3), "is not whole .*layers.2.* and 8 others"),
    "other sizes": (
        edits(hidden_size=48),
        r"of shape \(260, 32\), where its config.json describes \(260, 48\)",
    ),
    "an empty file": (writes("model.safetensors", ""), "has files that cannot be read"),
    "a broken tokenizer": (writes("tokenizer.json", "{"), "has no tokenizer that can be read"),
    "no tokenizer": (
        lambda folder: tiny_llama().save_pretrained(folder),
        "has no tokenizer that can be read",
    ),
    "a broken config": (writes("config.json", "{"), "has a config.json that is no JSON object"),
    "a list for a config": (writes("config.json", "[]"), "has a config.json that is no JSON object"),
    "a file": (lambda folder: folder.write_text("weights"), "is a file, and a model is a folder"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_plan_reads_the_names_and_headers_of_a_models_files(tmp_path, kind):
    """They were found out by the first step, after minutes or in the queue of a cluster."""
    make, says = BROKEN[kind]
    make(tmp_path / "model")
    found = plan(tmp_path / "model", tmp_path).exception
    assert isinstance(found, PftoolsError), found
    assert (
        re.search(says, str(found))
        and re.match(r".*mine.yaml, line 2", str(found))
        and "\n" not in str(found)
    )
    if kind != "a file":
        with pytest.raises(PftoolsError):
            loading.load_pretrained(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("kind", "pattern", "says"), [("mamba", "2:8", ""), ("gpt2", "2:64", "no multiple of 64")]
)
def test_a_pattern_is_held_against_the_matrices_that_are_pruned(tmp_path, kind, pattern, says):
    """A short convolution, which is none of them, made plan refuse it; a wide output of GPT-2 let it pass."""
    from tests.families import zoo

    zoo.build(kind).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    group = int(pattern[2:])
    found = plan(tmp_path / "model", tmp_path, f"patterns: ['{pattern}']\nsparsities: [{1 - 2 / group}]\n")
    assert (found.exit_code == 0) == (not says) and says in str(found.exception or ""), found.exception


def test_a_plain_model_is_planned(tmp_path):
    found = plan(save_tiny(tmp_path / "model"), tmp_path)
    assert found.exit_code == 0, found.exception


def test_a_checkpoint_that_lacks_weights_is_not_filled_up_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    path = save_tiny(tmp_path / "model") / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        PftoolsError, match="lack model.layers.1.mlp.up_proj.weight: the checkpoint is not whole"
    ):
        loading.load_pretrained(str(tmp_path / "model"))


def test_a_damaged_file_is_one_sentence(tmp_path):
    path = save_tiny(tmp_path / "model") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(PftoolsError, match="could not be loaded"):
        loading.load_pretrained(str(tmp_path / "model"))


# ------------------------------------------------------------------------------------------------------------
# In memory


def bert():
    torch.manual_seed(0)
    return BertLMHeadModel(BertConfig(vocab_size=260, initializer_range=0.2, **SIZES)).eval()


def bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=260,
        d_model=32,
        decoder_layers=1,
        decoder_ffn_dim=64,
        decoder_attention_heads=4,
        init_std=0.2,
        encoder_layers=1,
    )
    return BartForCausalLM(config).eval()


def asked(model):
    from lm_eval.api.instance import Instance

    lm = evaluate.PrefixCachedLM(pretrained=model, tokenizer=tiny_tokenizer(), progress=False)
    request = Instance("loglikelihood", {}, ("A question that is read,", " yes"), 0)
    return lm.loglikelihood([request], disable_tqdm=True)


DEEDS = {
    "perplexity": lambda model: evaluate.perplexity(model, tiny_blocks(), progress=False),
    "tasks": asked,
    "prune": lambda model: prune.prune_model(model, tiny_blocks(), progress=False),
    "finetune": lambda model: finetune.finetune_model(model, tiny_blocks(), steps=1, progress=False),
}


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize(("make", "says"), [(bert, "encoder"), (bart, "half of an encoder-decoder")])
def test_encoders_and_halves_in_memory_are_refused_by_every_step(deed, make, says):
    with pytest.raises(PftoolsError, match=says):
        DEEDS[deed](make())


@pytest.mark.parametrize("deed", ["perplexity", "prune", "finetune"])
def test_tokens_of_another_tokenizer_are_refused(deed):
    with pytest.raises(PftoolsError, match=r"hold the token 2\d\d, and the model knows 100"):
        DEEDS[deed](tiny_llama(vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=2))


def test_a_matrix_in_an_unknown_layout_is_an_error_that_names_it():
    class Curious(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.mixing = inner, nn.Parameter(torch.randn(4, 8, 32))

        def forward(self, hidden):
            return self.inner(hidden) + (hidden[..., None, None, :] * self.mixing).sum(dim=(-2, -3))

    model = tiny_llama()
    model.model.layers[1].mlp = Curious(model.model.layers[1].mlp)
    for ask in (layers.measured_sparsity, DEEDS["prune"]):
        with pytest.raises(
            PftoolsError, match=r"mlp.mixing of LlamaDecoderLayer .*\(Curious, \(4, 8, 32\)\)"
        ):
            ask(model)


@pytest.mark.parametrize("deed", DEEDS)
def test_a_model_that_cannot_read_is_one_sentence(deed):
    model = tiny_llama()
    model.model.layers[1].mlp.forward = lambda hidden: hidden.view(3, -1, 7)
    with pytest.raises(PftoolsError, match="LlamaForCausalLM itself cannot read a row of .* tokens: shape"):
        DEEDS[deed](model)


@pytest.mark.parametrize("deed", ["prune", "finetune"])
def test_a_model_that_peft_has_wrapped_is_refused(deed):
    """The factors of its adapter were pruned and counted as weights."""
    from peft import LoraConfig, get_peft_model

    with pytest.raises(PftoolsError, match=r"merge that first, with model.merge_and_unload\(\)"):
        DEEDS[deed](get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))


class Twice(nn.Module):
    """An MLP whose up_proj is given zeros, too."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden) + self.inner.down_proj(self.inner.up_proj(torch.zeros_like(hidden)))


class NotAlways(Twice):
    """An MLP whose up_proj shares the input of gate_proj with an odd number of rows only."""

    def forward(self, hidden):
        gate, up = self.inner.gate_proj, self.inner.up_proj
        return self.inner.down_proj(gate(hidden) * up(hidden if len(hidden) % 2 else hidden.clone()))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Twice, "more than once in a forward, and not each time with the input of mlp.inner.gate_proj"),
        (NotAlways, "with an input of its own in one forward and not in another"),
    ],
)
def test_a_matrix_that_shares_its_input_not_always_is_refused_and_pruned_by_magnitude(kind, says):
    model = tiny_llama()
    model.model.layers[0].mlp = kind(model.model.layers[0].mlp)
    with pytest.raises(PftoolsError, match=f"mlp.inner.up_proj of LlamaDecoderLayer .*{says}.*magnitude"):
        prune.prune_model(model, tiny_blocks(5), batch_size=2, progress=False)
    prune.prune_model(model, tiny_blocks(5), method="magnitude", progress=False)
    assert layers.measured_sparsity(model) == pytest.approx(0.5, abs=0.01)


def test_a_tokenizer_that_ends_every_text_is_refused():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    with pytest.raises(PftoolsError, match="ends every text with '<eos>'.*add_eos_token to false"):
        evaluate.PrefixCachedLM(pretrained=tiny_llama(), tokenizer=tokenizer)


# ------------------------------------------------------------------------------------------------------------
# The first token of a block


def beginning_tokenizer():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_blocks_follow_the_tokenizers_first_token_but_for_the_papers_families():
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    mistral = AutoModelForCausalLM.from_config(
        MistralConfig(vocab_size=260, num_key_value_heads=2, initializer_range=0.2, **SIZES)
    ).eval()
    assert evaluate.first_token(mistral, beginning_tokenizer()) == 256
    assert evaluate.first_token(mistral, tiny_tokenizer()) is None
    assert evaluate.first_token(tiny_llama(), beginning_tokenizer()) is None, "the papers read LLaMA without"
    blocks = tiny_blocks()
    found = evaluate.perplexity(mistral, blocks, first=256, progress=False).block_nll
    begun = blocks.clone()
    begun[:, 0] = 256
    with torch.no_grad():
        expected = [mistral(row[None], labels=row[None]).loss for row in begun]
    assert torch.allclose(found.float(), torch.stack(expected), atol=1e-5)
    assert not torch.allclose(
        found, evaluate.perplexity(mistral, blocks, progress=False).block_nll, atol=1e-3
    )
