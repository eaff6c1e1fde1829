"""What a config states beyond sizes: refused where it cannot be modelled, else remarked upon."""

from __future__ import annotations

from collections.abc import Iterator

from peftplan.arch.config import Config, printable, show


def refuse_unmodelled(config: Config) -> None:
    """Raises Unsupported for a switch that changes the computation in a way that is not modelled."""
    for key, why in _REFUSED.items():
        if config.values.get(key):
            raise config.unsupported(f"{key} {show(config.values[key])} is not modelled; {why}")


_REFUSED = {
    "is_encoder_decoder": "only decoders are",
    "per_layer_config": "layers that differ by it are not",
    "output_attentions": "set it to false",
    "output_hidden_states": "set it to false",
}


def remarks(config: Config) -> Iterator[str]:
    """What the config states beyond sizes that a reader of the answer should know."""
    if has_code(config):
        yield (
            f"{config.label} names code of its own (auto_map), which is never run; "
            f"the {config.values['model_type']} of transformers is taken"
        )
    quantization = config.fields("quantization_config")
    if quantization:
        yield (
            f"{config.label} is of a quantized checkpoint ({show(quantization.get('quant_method'))}); "
            "the unquantized model is taken, choose the weight format with --format"
        )
    heads = [printable(str(name)) for name in config.entries("architectures") or ()]
    if heads and not any(name.endswith("ForCausalLM") for name in heads):
        yield f"{config.label} names {', '.join(heads)}; a causal language model is taken"


def has_code(config: Config) -> bool:
    """Whether it names Python code of its own; nothing here ever runs it."""
    return bool(config.values.get("auto_map"))
