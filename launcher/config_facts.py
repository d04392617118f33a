"""A Hugging Face config.json read with transformers' own defaults and checked types."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.errors import ModelError

# What transformers 5.23 assumes when a config.json lacks the key: the field defaults of
# models/<type>/configuration_<type>.py. A key with the value null counts as lacking where
# transformers itself then derives a value.
_SHARED = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "llama": _SHARED
    | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048},
    "mistral": _SHARED
    | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"max_position_embeddings": 131072, "sliding_window": 4096},
    "mixtral": _SHARED
    | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"max_position_embeddings": 131072, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen2": _SHARED
    | {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    | {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": _SHARED
    | {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    | {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
    | {"head_dim": 128},
    "qwen3_moe": _SHARED
    | {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144}
    | {"num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 4}
    | {"max_position_embeddings": 32768, "sliding_window": 4096, "moe_intermediate_size": 768}
    | {"num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1},
    "phi": _SHARED
    | {"vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192}
    | {"num_hidden_layers": 24, "num_attention_heads": 32, "max_position_embeddings": 2048}
    | {"hidden_act": "gelu_new", "qk_layernorm": False},
    "phi3": _SHARED
    | {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096},
    "falcon": {"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32}
    | {"num_attention_heads": 71, "max_position_embeddings": 2048, "activation": "gelu"}
    | {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}
    | {"bias": False, "tie_word_embeddings": True},
    "gemma2": _SHARED
    | {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "head_dim": 256}
    | {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}
    | {"max_position_embeddings": 8192, "sliding_window": 4096, "tie_word_embeddings": True}
    | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": _SHARED
    | {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "head_dim": 256}
    | {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}
    | {"max_position_embeddings": 131072, "sliding_window": 4096, "tie_word_embeddings": True}
    | {"sliding_window_pattern": 6},
    "gpt_neox": {"vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576}
    | {"num_hidden_layers": 44, "num_attention_heads": 64, "max_position_embeddings": 2048}
    | {"attention_bias": True, "tie_word_embeddings": False, "use_parallel_residual": True}
    | {"hidden_act": "gelu"},
}
SUPPORTED_MODEL_TYPES: tuple[str, ...] = tuple(_DEFAULTS)


def is_unknown(config: Mapping[str, object]) -> bool:
    """Return whether a config names an architecture that has no closed form.

    Of a model of more than text, the tracing worker finds out whether its language model is
    trained alone; that of Gemma 3 is known.
    """
    model_type = config.get("model_type")
    if isinstance(config.get("text_config"), Mapping):
        return isinstance(model_type, str) and model_type != "gemma3"
    return isinstance(model_type, str) and model_type not in SUPPORTED_MODEL_TYPES


class ConfigFacts:
    """A config mapping read with transformers' defaults and checked types.

    Raises:
        ModelError: from any reader, when the value is absent or of the wrong type.
    """

    def __init__(self, config: Mapping[str, object], *, name: str) -> None:
        self._where = f"config of {name}"
        is_multimodal = isinstance(config.get("text_config"), Mapping)
        self.model_type = self._supported_type(
            config.get("model_type"), is_multimodal=is_multimodal
        )
        self._values = {**_DEFAULTS[self.model_type], **config}

    def _supported_type(self, model_type: object, *, is_multimodal: bool) -> str:
        if is_multimodal:
            raise ModelError(
                f"model_type {model_type!r} is a model of more than text",
                where=self._where,
                fix="take its language model alone: a folder with the text_config as config.json",
            )
        if not isinstance(model_type, str) or model_type not in _DEFAULTS:
            raise ModelError(
                f"model_type {model_type!r} has no closed-form weight inventory",
                where=self._where,
                fix=f"use one of {', '.join(SUPPORTED_MODEL_TYPES)}; `zerofit plan` of a single"
                " recipe traces others",
            )
        return model_type

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a count above 0; ``default`` stands in for an absent or null value."""
        value = self._values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(
                f"{key} is {value!r}, it must be a whole number above 0",
                where=self._where,
                fix=f"give the model's {key}",
            )
        return value

    def optional_integer(self, key: str) -> int | None:
        """Return a count above 0, or ``None`` when absent or null."""
        return None if self._values.get(key) is None else self.integer(key)

    def number(self, key: str) -> float | None:
        """Return a number, or ``None`` when absent or null."""
        value = self._values.get(key)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        raise ModelError(f"{key} is {value!r}, not a number", where=self._where, fix="mend it")

    def flag(self, key: str) -> bool:
        """Return a boolean; absent or null is false."""
        value = self._values.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise ModelError(f"{key} is {value!r}", where=self._where, fix="write true or false")

    def items(self, key: str) -> list[object]:
        """Return a list; absent or null is empty."""
        value = self._values.get(key)
        return list(value) if isinstance(value, list | tuple) else []

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        # RefinedWeb's first configs call it n_embed; FalconConfig still accepts that.
        return self.integer("n_embed", self.integer("hidden_size"))

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""
        return self.integer("num_hidden_layers")

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return self.integer("num_attention_heads")

    @property
    def head_dim(self) -> int:
        """Width of one head; hidden_size / heads where the config is silent."""
        if self.model_type in ("phi", "gpt_neox", "falcon"):  # their modeling files ignore the key
            return self.hidden_size // self.num_attention_heads
        return self.integer("head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads; as many as query heads where the config is silent."""
        if self.model_type == "gpt_neox":
            return self.num_attention_heads
        if self.model_type != "falcon":
            return self.integer("num_key_value_heads", self.num_attention_heads)
        if self.flag("new_decoder_architecture"):
            return self.integer("num_kv_heads", self.num_attention_heads)
        return 1 if self.flag("multi_query") else self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Width inside the (dense) MLP; Falcon's default is 4 x hidden_size."""
        if self.model_type == "falcon":
            return self.integer("ffn_hidden_size", 4 * self.hidden_size)
        return self.integer("intermediate_size")

    @property
    def activation(self) -> str:
        """Name of the MLP's activation; the key has three spellings."""
        is_gemma = self.model_type in ("gemma2", "gemma3_text")
        # Gemma reads hidden_activation alone: its configs' older hidden_act says "gelu".
        keys = ("hidden_activation",) if is_gemma else ("activation", "hidden_act")
        found = next((self._values[key] for key in keys if self._values.get(key)), None)
        return str(found) if found else ("gelu_pytorch_tanh" if is_gemma else "silu")

    @property
    def num_experts(self) -> int:
        """Routed experts of an MoE layer; the config key has two spellings."""
        return self.integer("num_local_experts", self.integer("num_experts"))
