"""Models as users have them: wrapped, compiled, without their head, with weights that are elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import SMALL, make_model
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)


def small(**changes: Any) -> PreTrainedModel:
    """The tiny Llama in float32, as PEFT's factors are."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()


def vision() -> PreTrainedModel:
    """A vision-language model, whose text model is nested."""
    torch.manual_seed(0)
    eyes = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=eyes, text_config=LlamaConfig(**SMALL), image_token_index=511, vision_feature_layer=-1
        )
    ).eval()


# --- what comes off ---------------------------------------------------------------------------------------------------


def compiled(model: PreTrainedModel) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: PreTrainedModel) -> Any:
    model.compile(backend="eager")
    return model


def compiled_layers(model: PreTrainedModel) -> Any:
    layers = model.get_decoder().layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    return model


def compiled_layers_in_place(model: PreTrainedModel) -> Any:
    for layer in model.get_decoder().layers:
        layer.compile(backend="eager")
    return model


def compiled_forward(model: PreTrainedModel) -> Any:
    for module in (model, *model.get_decoder().layers):
        module.forward = torch.compile(module.forward, backend="eager")
    return model


def compiled_projection(model: PreTrainedModel) -> Any:
    for layer in model.get_decoder().layers:
        layer.mlp.down_proj = torch.compile(layer.mlp.down_proj, backend="eager")
    return model


def compiled_twice(model: PreTrainedModel) -> Any:
    return torch.compile(nn.DataParallel(compiled_layers(model)), backend="eager")


def compiled_again(model: PreTrainedModel) -> Any:
    """Which is a function, and no module."""
    return torch.compile(torch.compile(model, backend="eager"), backend="eager")


def checkpointed(model: PreTrainedModel) -> Any:
    layers = model.get_decoder().layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    return model


def data_parallel(model: PreTrainedModel) -> Any:
    return nn.DataParallel(model)


def distributed(model: PreTrainedModel) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def unloaded_in_place(model: PreTrainedModel) -> Any:
    """A PeftModel whose owner did not take what ``unload`` returned."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.unload()
    return wrapped


def dispatched(model: PreTrainedModel) -> Any:
    """Accelerate's hooks on every module, all weights in memory."""
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def prepared(model: PreTrainedModel) -> Any:
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(model)


def as_it_is(model: PreTrainedModel) -> Any:
    return model


TAKEN_OFF = [
    as_it_is,
    compiled,
    compiled_in_place,
    compiled_layers,
    compiled_layers_in_place,
    compiled_forward,
    compiled_projection,
    compiled_twice,
    compiled_again,
    checkpointed,
    data_parallel,
    distributed,
    unloaded_in_place,
    dispatched,
    prepared,
]


# --- what is refused --------------------------------------------------------------------------------------------------


def lora() -> Any:
    return get_peft_model(small(), LoraConfig(r=2, target_modules=["q_proj"]))


def disabled() -> Any:
    wrapped = lora()
    wrapped.base_model.disable_adapter_layers()
    return wrapped


def merged() -> Any:
    wrapped = lora()
    wrapped.merge_adapter()
    return wrapped


def lora_inside() -> Any:
    return lora().base_model.model


def deleted() -> Any:
    wrapped = lora()
    wrapped.delete_adapter("default")
    return wrapped


def prompt_tuned() -> Any:
    return get_peft_model(small(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))


def sharded_the_old_way() -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(small(), device_id=torch.device("cpu"))


def value_head() -> Any:
    """As trl's AutoModelForCausalLMWithValueHead is made."""
    wrapped = nn.Module()
    wrapped.pretrained_model = small()
    return wrapped


def engine() -> Any:
    """As DeepSpeed's."""
    wrapped = nn.Module()
    wrapped.module = small()
    return wrapped


def pipeline() -> Any:
    from models import make_tokenizer
    from transformers import TextGenerationPipeline

    return TextGenerationPipeline(model=small(), tokenizer=make_tokenizer())


def mixed_precision() -> Any:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(small())
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def classifier() -> Any:
    return LlamaForSequenceClassification(LlamaConfig(**SMALL))


def token_classifier() -> Any:
    return LlamaForTokenClassification(LlamaConfig(**SMALL))


def masked() -> Any:
    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=1,
        )
    )


def t5() -> Any:
    sizes = {"vocab_size": 512, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes))


def t5_encoder() -> Any:
    return T5EncoderModel(T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))


def on_meta() -> Any:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SMALL))


def half_on_meta() -> Any:
    model = small()
    model.model.layers[2].to("meta")
    return model


def offloaded(place: dict[str, str], folder: Path) -> Any:
    """Loaded with a device_map."""
    pytest.importorskip("accelerate")
    small().save_pretrained(folder / "model")
    return LlamaForCausalLM.from_pretrained(folder / "model", device_map=place, offload_folder=folder / "offload")


def cpu_offloaded() -> Any:
    return pytest.importorskip("accelerate").cpu_offload(small(), torch.device("cpu"))


def wrapped_otherwise() -> Any:
    """Its layers are in a wrapper that nobody knows."""

    class Wrapper(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self._inside = inside

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self._inside(*args, **kwargs)

    model = small()
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = Wrapper(layer)
    return model


HEADLESS = r"model must be a causal LM with its language modelling head; got {}, .*AutoModelForCausalLM"
OF_PEFT = r"wrapped by PEFT; .*merge_and_unload\(\)"
NO_MODEL = r"model must be a transformers causal LM; got {}"
ELSEWHERE = r"'{}' is on the meta device .*onto one device"
REFUSED = [
    (lora, OF_PEFT),
    (disabled, OF_PEFT),
    (merged, OF_PEFT),
    (lora_inside, r"PEFT's layers inside, .*Load its base model afresh; .*PeftModel.from_pretrained\(base, adapter\)"),
    (deleted, OF_PEFT),
    (prompt_tuned, OF_PEFT),
    (sharded_the_old_way, 'wrapped by FullyShardedDataParallel.*strategy="thought_fsdp"'),
    (value_head, NO_MODEL.format(r"Module. Pass its \.pretrained_model")),
    (engine, NO_MODEL.format(r"Module. Pass its \.module")),
    (pipeline, NO_MODEL.format(r"TextGenerationPipeline. Pass its \.model")),
    (lambda: LlamaForCausalLM, NO_MODEL.format(r"the class LlamaForCausalLM. load_model\(name\)")),
    (lambda: "smollm2", NO_MODEL.format(r"str. load_model\(name\)")),
    (lambda: None, NO_MODEL.format("NoneType")),
    (lambda: copy.deepcopy(small().state_dict()), NO_MODEL.format("OrderedDict")),
    (mixed_precision, r"another precision.*keep_fp32_wrapper=False"),
    (lambda: small().model, HEADLESS.format("LlamaModel")),
    (lambda: compiled(small().model), HEADLESS.format("LlamaModel")),
    (lambda: make_model("gpt2").transformer, HEADLESS.format("GPT2Model")),
    (lambda: vision().model.language_model, HEADLESS.format("LlamaModel")),
    (classifier, HEADLESS.format("LlamaForSequenceClassification")),
    (token_classifier, HEADLESS.format("LlamaForTokenClassification")),
    (masked, HEADLESS.format("ModernBertForMaskedLM")),
    (t5_encoder, HEADLESS.format("T5EncoderModel")),
    (t5, "cross-attention; expected a decoder-only model"),
    (on_meta, ELSEWHERE.format(r"model\.embed_tokens\.weight")),
    (half_on_meta, ELSEWHERE.format(r"model\.layers\.2\.self_attn\.q_proj\.weight")),
    (cpu_offloaded, ELSEWHERE.format(r"model\.embed_tokens\.weight")),
    (wrapped_otherwise, r"'model\.layers\.0\._inside\..*' is in a Wrapper"),
]


def start_processes(folder: Path) -> None:
    """A process group of this process alone, which DDP and FSDP ask for."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=0, world_size=1)
