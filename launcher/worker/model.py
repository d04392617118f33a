"""The model a rank trains: full, LoRA or QLoRA, with the plan's memory savings switched on."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from launcher.errors import ModelError
from launcher.recipe_sections import Recipe
from launcher.strategy import (
    Checkpointing,
    Loss,
    Method,
    Offload,
    Optimizer,
    Precision,
    Strategy,
)
from launcher.worker.attention import settle_attention
from launcher.worker.loss import use_chunked_loss
from launcher.worker.mapped_weights import weights_stay_in_files
from launcher.worker.model_facts import expert_names, is_router
from launcher.worker.prerequisites import check_nvme, check_packages
from launcher.worker.random_weights import quantized_model_with_random_weights
from launcher.worker.unreadable import unreadable
from launcher.workload import ALL_LINEAR, ATTENTION_ONLY

logger = logging.getLogger(__name__)

MODEL_CONFIG = "model_config"
"""Folder in the run directory with the config.json of a model that has no weights."""

_DTYPES = {
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.fp32: torch.float32,
}


def load_model(
    recipe: Recipe, strategy: Strategy, *, precision: Precision, device: torch.device, run_dir: Path
) -> Any:
    """Return the model on ``device``, ready for the trainer.

    Under ZeRO-3 the transformers DeepSpeed configuration must be alive already, so that each
    weight is partitioned as it is created.

    Raises:
        ModelError: the model cannot be found, read, or trained this way.
        SetupError: a package that the plan needs is not installed.
    """
    check_packages(recipe.method, strategy)
    check_nvme(recipe.strategy.nvme_path, strategy)
    config = _read_config(recipe, strategy, run_dir)
    _check_not_quantized(recipe, config)
    dtype = _DTYPES[precision]
    quantization = None
    if recipe.method is Method.qlora:
        quantization = quantization_config(recipe, dtype=dtype)
        if strategy.zero_stage == 3:
            from launcher.worker.gathered_4bit import (
                let_dora_read_4bit_weights,
                release_gathered_4bit_weights,
            )

            release_gathered_4bit_weights()
            let_dora_read_4bit_weights()
    if recipe.model.random_weights:
        model = _random_model(config, quantization, dtype=dtype, device=device, strategy=strategy)
    else:
        model = _pretrained_model(recipe, config, quantization, dtype=dtype, device=device)
    settle_attention(model, strategy.attention, dtype=dtype, device=device)
    if strategy.loss is Loss.chunked:
        max_tokens = recipe.max_seq_len * strategy.micro_batch_size_per_gpu
        use_chunked_loss(model, max_tokens=max_tokens)
    if recipe.method is not Method.full:
        model = _add_adapters(model, recipe)
    enable_checkpointing(model, strategy.gradient_checkpointing, device=device)
    return model


def quantization_config(recipe: Recipe, *, dtype: torch.dtype) -> Any:
    """Return the bitsandbytes configuration of a QLoRA recipe."""
    from transformers import BitsAndBytesConfig

    if recipe.quantization.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=recipe.quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        # ZeRO-3 gathers and partitions one dtype at a time, so the packed weights must look
        # like the others (transformers documentation, "bitsandbytes", FSDP and DeepSpeed).
        bnb_4bit_quant_storage=dtype,
    )


def optimizer_class(strategy: Strategy) -> tuple[type[torch.optim.Optimizer], dict[str, bool]]:
    """Return the optimizer's class and the arguments that make it the plan's variant.

    With the optimizer states offloaded, accelerate replaces it by DeepSpeedCPUAdam, keeping
    learning rate, betas and weight decay (accelerate 1.15
    ``utils/deepspeed.py:map_pytorch_optim_to_deepspeed``). It turns an 8-bit AdamW into Adam
    without decoupled weight decay on that way, hence torch's AdamW there.
    """
    if strategy.offload_optimizer is not Offload.none:
        return torch.optim.AdamW, {}
    if strategy.optimizer.is_8bit:
        import bitsandbytes

        is_paged = strategy.optimizer is Optimizer.paged_adamw_8bit
        return bitsandbytes.optim.AdamW8bit, {"is_paged": is_paged}
    return torch.optim.AdamW, {
        "fused": strategy.optimizer is Optimizer.adamw,
        "foreach": strategy.optimizer is Optimizer.adamw_foreach,
    }


def enable_checkpointing(model: Any, mode: Checkpointing, *, device: torch.device) -> None:
    """Recompute each decoder layer in backward; with ``cpu_offload`` its input waits on the host.

    Done after PEFT has wrapped the model: PEFT would otherwise make the embeddings' output
    require a gradient, which only reentrant checkpointing needs and which costs one.
    """
    if mode is Checkpointing.none:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if mode is Checkpointing.full:
        return

    def checkpoint_on_host(function: Any, *args: Any, **kwargs: Any) -> Any:
        # Inside, the checkpoint's own hooks take precedence: only the layer's input, which
        # the checkpoint saves before they are installed, passes through these.
        with save_on_cpu(pin_memory=device.type == "cuda"):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = checkpoint_on_host


def model_source(recipe: Recipe, run_dir: Path) -> str:
    """Return where the model's configuration is read: the run directory's copy comes first."""
    copy = run_dir / MODEL_CONFIG
    return str(copy) if (copy / "config.json").is_file() else recipe.model.name_or_path


def _read_config(recipe: Recipe, strategy: Strategy, run_dir: Path) -> Any:
    from transformers import AutoConfig

    source = model_source(recipe, run_dir)
    try:
        config = AutoConfig.from_pretrained(
            source,
            revision=recipe.model.revision if source == recipe.model.name_or_path else None,
            trust_remote_code=recipe.model.trust_remote_code,
            attn_implementation=strategy.attention.value,
        )
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(source, error) from error
    if recipe.model.max_position_embeddings is not None:
        # Position encodings that stretch with the limit read it when the model is made.
        config.get_text_config().max_position_embeddings = recipe.model.max_position_embeddings
    return config


def _check_not_quantized(recipe: Recipe, config: Any) -> None:
    packing = getattr(config, "quantization_config", None) or {}
    if recipe.method is not Method.qlora and packing.get("quant_method") == "bitsandbytes":
        raise ModelError(
            "its weights are stored in 4 or 8 bits (bitsandbytes)",
            where=recipe.model.name_or_path,
            fix=f"choose the method qlora, or the model in full precision for {recipe.method}",
        )


def _pretrained_model(
    recipe: Recipe, config: Any, quantization: Any, *, dtype: torch.dtype, device: torch.device
) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = quantization
    reading: contextlib.AbstractContextManager[None] = weights_stay_in_files()
    if not is_deepspeed_zero3_enabled():
        options["device_map"] = {"": device}
        reading = contextlib.nullcontext()
    elif quantization is not None:
        from launcher.worker.partitioned_4bit import partitioned_while_loading

        reading = partitioned_while_loading()
    try:
        with reading:
            model, info = AutoModelForCausalLM.from_pretrained(
                recipe.model.name_or_path,
                config=config,
                revision=recipe.model.revision,
                trust_remote_code=recipe.model.trust_remote_code,
                dtype=dtype,
                attn_implementation=config._attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are an error below, in words
                **options,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise unreadable(recipe.model.name_or_path, error) from error
    # transformers fills what is missing with random numbers and goes on.
    wrong = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
    if wrong:
        raise ModelError(
            f"{len(wrong)} of the model's tensors are missing or of another shape, such as "
            f"{wrong[0]}",
            where=recipe.model.name_or_path,
            fix="copy or download the model again; config.json must belong to the weights",
        )
    return model


def _random_model(
    config: Any, quantization: Any, *, dtype: torch.dtype, device: torch.device, strategy: Strategy
) -> Any:
    from transformers import AutoModelForCausalLM

    logger.warning("random weights: good for measuring memory and speed, never for results")
    if quantization is not None:
        partition = None
        if strategy.zero_stage == 3:
            from launcher.worker.partitioned_4bit import partitioner

            partition = partitioner()
        return quantized_model_with_random_weights(
            config, quantization, dtype=dtype, device=device, partition=partition
        )
    options = {"dtype": dtype, "attn_implementation": strategy.attention.value}
    if strategy.zero_stage == 3:
        # transformers opens deepspeed.zero.Init itself, on the right device.
        return AutoModelForCausalLM.from_config(config, **options)
    with device:
        return AutoModelForCausalLM.from_config(config, **options)


def _add_adapters(model: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = recipe.lora
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=adapter_targets(model, lora.target_modules),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    try:
        # DeepSpeed keeps fp32 master weights of all that is trained; fp32 adapters besides
        # would make fp32 copies of every adapted layer's input (peft's autocast_adapter_dtype).
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(
            f"no adapter can be added: {error}",
            where=f"lora.target_modules = {list(lora.target_modules)}",
            fix="use all-linear, attention, or names of this model's linear modules",
        ) from error


def adapter_targets(model: Any, targets: tuple[str, ...]) -> str | list[str]:
    """Return what PEFT takes as ``target_modules``: its own keyword, or module names."""
    if targets == (ALL_LINEAR,):
        return _all_linear(model)
    if targets != (ATTENTION_ONLY,):
        return list(targets)
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ("attn" in name or "attention" in name)
    }
    if not names:
        raise ModelError(
            f"{model.config.model_type} has no module named after attention",
            where="lora.target_modules = ['attention']",
            fix="name the modules, or use all-linear",
        )
    return sorted(names)


def _all_linear(model: Any) -> str | list[str]:
    """Return PEFT's keyword, or all names but those that it would take for fused experts."""
    experts = set(expert_names(model))
    linears = {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    routers = {name for name, module in linears.items() if is_router(module)}
    if not experts and not routers:
        return "all-linear"
    return sorted(set(linears) - experts - routers)
