"""A model wrapped by PEFT while it is trained, and what comes out of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import transformers_weight_conversion

from pftools.adapters import Adapter, factors_of
from pftools.finetune.masked import fuse_hira, masked_modules
from pftools.finetune.recipe import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def adapted(model: PreTrainedModel, training: Training) -> Iterator[PeftModel]:
    """The model wrapped by PEFT; unwrapped afterwards, with its gradient flags and its mode as they were."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    text = model.config.get_text_config()  # a multimodal model has one of its own
    mode, use_cache = model.training, getattr(text, "use_cache", None)
    torch.manual_seed(training.recipe.seed)
    with warnings.catch_warnings():
        # PEFT asks by a name that transformers has changed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        with _names_as_given():
            peft_model = get_peft_model(model, _config(training))
    text.use_cache = False
    assert isinstance(peft_model, PeftModel)
    fuse_hira(peft_model)
    try:
        yield peft_model
    finally:
        peft_model.unload()
        if getattr(model, "is_activation_checkpointing", False):
            model.activation_checkpointing_disable()
        if getattr(model, "_require_grads_hook", None) is not None:
            model.disable_input_require_grads()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, False))
        text.use_cache = use_cache
        model.train(mode)
        for marker in ("peft_config", "_hf_peft_config_loaded"):
            if marker in vars(model):
                delattr(model, marker)


@contextmanager
def _names_as_given() -> Iterator[None]:
    """PEFT without its translation of targets from transformers 4.

    It takes the gate_proj of a dense layer for the experts' of old, and would adapt the stacked experts too.
    """
    translate = transformers_weight_conversion.convert_peft_config_for_transformers
    transformers_weight_conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = translate


def _config(training: Training) -> HiraConfig | LoraConfig:
    recipe, targets = training.recipe, list(training.targets)
    if recipe.adapter == "hira":
        return HiraConfig(
            r=recipe.rank, hira_dropout=recipe.dropout, target_modules=targets, task_type="CAUSAL_LM"
        )
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank: any number will do
        lora_dropout=recipe.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    if training.masked:
        config._register_custom_module(masked_modules())
    return config


def read_adapter(peft_model: PeftModel, training: Training) -> Adapter:
    """The trained factors, float32 on the CPU."""
    recipe = training.recipe
    factors = factors_of(get_peft_model_state_dict(peft_model, save_embedding_layers=False), recipe.adapter)
    if recipe.adapter == "hira":
        return Adapter(factors, 1.0, "hira")
    return Adapter(factors, recipe.alpha / recipe.rank, "lora", training.masked, training.zeros)
