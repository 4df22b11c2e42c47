"""Configurations of models that share KV across layers, for transformers and vLLM."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig

from . import layer_map
from .layer_map import LayerMap


class _SharedLlamaConfig(LlamaConfig):
    """A Llama with a layer map, written as its authors do: ``"0_1_1"``."""

    layer_types: str | list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers and vLLM expect a sequence with one item per layer.
        if isinstance(self.layer_types, str):
            self.layer_types = self.layer_types.split("_")
        super().__post_init__(**kwargs)

    def validate_layer_type(self) -> None:
        """Check the map; transformers calls this.

        Raises:
            ValueError: ``layer_types`` does not fit the model.
        """
        count = len(self.layer_types or ()) or self.num_hidden_layers
        if count != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {count} entries; this model has "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        _ = self.layer_map

    @property
    def layer_map(self) -> LayerMap:
        """Which layers write and read KV."""
        raise NotImplementedError

    def _roles(self) -> list[int]:
        try:
            return [int(entry) for entry in self.layer_types or ()]
        except ValueError as error:
            raise ValueError(
                f"layer_types of a {self.model_type} model has numbers, not {error}"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written to ``config.json``."""
        written = super().to_dict()
        if isinstance(written.get("layer_types"), list):
            written["layer_types"] = "_".join(written["layer_types"])
        return written


@strict
class ClaLlamaConfig(_SharedLlamaConfig):
    """A Llama with Cross-Layer Attention (arXiv 2405.12981).

    Attributes:
        cla_share_factor: Layers that share one KV cache; the last group may be shorter.
        cla_map: ``every``, ``keep_ends``, ``dense_front`` or ``dense_back``, see
            `layer_map`.
        layer_types: The map spelled out instead, in the roles of LCKV's authors: 1
            reads the nearest layer below that is not 1 (``"2_1_2_1"`` is CLA2).
        use_qk_norm: RMS norms of queries and keys per head after the rotation, each
            with weights of its own in every layer (Hunyuan).
    """

    model_type = "cla-llama"

    cla_share_factor: int = 2
    cla_map: str = "every"
    use_qk_norm: bool = False

    @property
    def layer_map(self) -> LayerMap:
        layers, factor = self.num_hidden_layers, self.cla_share_factor
        if self.layer_types is not None:
            return LayerMap.of(layer_map.of_cla_roles(self._roles()))
        if factor < 1:
            raise ValueError(f"cla_share_factor={factor} must be at least 1")
        if self.cla_map not in layer_map.CLA_MAPS:
            known = ", ".join(layer_map.CLA_MAPS)
            raise ValueError(f"cla_map={self.cla_map!r} is none of {known}")
        owners = layer_map.CLA_MAPS[self.cla_map](layers, factor)
        if len(owners) != layers:
            raise ValueError(
                f"cla_map={self.cla_map} with cla_share_factor={factor} does not fit "
                f"num_hidden_layers={layers}"
            )
        return LayerMap.of(owners)


@strict
class LCKVLlamaConfig(_SharedLlamaConfig):
    """A Llama with Layer-Condensed KV (arXiv 2405.10637).

    Attributes:
        layer_types: The layer whose KV each layer reads, with ``s`` for a sliding
            window; None = its own.
        forward_passes: ``m``, passes over a prompt without gradients in training.
        backward_passes: ``b``, passes with gradients. A prompt is read in ``m + b``
            passes at most; chunks of so many tokens are exact.
        sliding_window: Of the layers marked ``s``, the current token included.
        use_sequential: Read prompts exactly, as if token by token.
        force_nodiag: No layer attends to the current token, as in the paper's code.
    """

    model_type = "lckv-llama"

    forward_passes: int = 7
    backward_passes: int = 2
    sliding_window: int | None = 4096
    use_sequential: bool = False
    force_nodiag: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [str(i) for i in range(self.num_hidden_layers)]
        super().__post_init__(**kwargs)

    @property
    def layer_map(self) -> LayerMap:
        return LayerMap.parse(self.layer_types or (), self.force_nodiag)

    @property
    def passes(self) -> int:
        """Passes over a prompt; what they read of it first is exact."""
        return self.forward_passes + self.backward_passes


@strict
class OptLlamaConfig(_SharedLlamaConfig):
    """The same from the first code base of LCKV's authors.

    Attributes:
        layer_types: Roles, see `layer_map.of_roles`.
        target_layer: The layer that the middle layers read.
        num_encoders: ``m + b - 1``.
        num_trained_encoders: ``b - 1``.
        train_kv: A loss of training; ignored.
        use_sequential: As in `LCKVLlamaConfig`.
    """

    model_type = "opt-llama"

    target_layer: int = -1
    num_encoders: int = 8
    num_trained_encoders: int = 1
    train_kv: bool = False
    use_sequential: bool = False
    sliding_window: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if (ordinary := kwargs.pop("num_warmup_layers", None)) is not None:
            middle = self.num_hidden_layers - ordinary - 1
            self.layer_types = [*"0" * ordinary, *"1" * middle, "2"]
            self.target_layer = self.num_hidden_layers - 1
        super().__post_init__(**kwargs)

    @property
    def layer_map(self) -> LayerMap:
        roles = self._roles() or [0] * self.num_hidden_layers
        owners = layer_map.of_roles(roles, self.target_layer)
        return LayerMap.of(owners, never_itself=True)

    @property
    def passes(self) -> int:
        """Passes over a prompt; what they read of it first is exact."""
        return self.num_encoders + 1


@strict
class YocoConfig(PreTrainedConfig):
    """YOCO (arXiv 2405.05254), in the names of the authors' ``params.json``.

    Attributes:
        dim: Width of the residual stream.
        n_layers: Half of them are the self-decoder, half the cross-decoder.
        hidden_dim: Width inside the feed-forward layers.
        n_self_heads: Heads of the self-decoder, KV heads as well.
        n_attn_heads: Query heads of the cross-decoder.
        n_attn_kv_heads: KV heads of the one global KV cache.
        max_seq_len: Longest sequence.
        rope_theta: Base of the rotation.
        norm_eps: Of all RMS norms.
        sliding_window: Tokens that the self-decoder's attention sees, the current one
            included; None = gated retention.
        early_exit: Prompt tokens skip the cross-decoder; only the last one, whose
            logits are wanted, runs through it. The answers are the same.
    """

    model_type = "yoco"
    attribute_map = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "hidden_dim",
        "num_attention_heads": "n_attn_heads",
        "num_key_value_heads": "n_attn_kv_heads",
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "norm_eps",
    }

    dim: int = 3072
    n_layers: int = 26
    hidden_dim: int = 8192
    n_self_heads: int = 24
    n_attn_heads: int = 24
    n_attn_kv_heads: int = 8
    vocab_size: int = 100288
    max_seq_len: int = 4096
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    early_exit: bool = True
    initializer_range: float = 0.02
    architectures: list[str] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # vLLM asks the class, not the configuration, whether there are states.
        if self.sliding_window is None and self.architectures == ["YocoForCausalLM"]:
            self.architectures = ["YocoRetentionForCausalLM"]

    @property
    def layer_types(self) -> list[str]:
        """What vLLM and transformers call the layers."""
        half = self.n_layers // 2
        slides = self.sliding_window is not None
        lower = "sliding_attention" if slides else "linear_attention"
        return [lower] * half + ["full_attention"] * half

    def validate_architecture(self) -> None:
        """Check the shapes; transformers calls this.

        Raises:
            ValueError: They do not fit each other.
        """
        sizes = ("dim", "hidden_dim", "n_self_heads", "n_attn_heads", "n_attn_kv_heads")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_layers < 2 or self.n_layers % 2:
            raise ValueError(f"n_layers={self.n_layers} must be even and at least 2")
        for name in ("n_self_heads", "n_attn_heads"):
            heads = getattr(self, name)
            if self.dim % (2 * heads):
                raise ValueError(
                    f"{name}={heads} does not divide dim={self.dim} into even head "
                    "sizes"
                )
        if self.n_attn_heads % self.n_attn_kv_heads:
            raise ValueError(
                f"n_attn_kv_heads={self.n_attn_kv_heads} does not divide "
                f"n_attn_heads={self.n_attn_heads}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"sliding_window={self.sliding_window} must be at least 1, or null "
                "for gated retention"
            )
