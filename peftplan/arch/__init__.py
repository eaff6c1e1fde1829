"""What a model is: config.json read into an `Arch`, and the catalog of known models."""

from peftplan.arch.core import Activation, Arch, Attention, Experts, Layer, Mlp, NormKind
from peftplan.arch.count import parameter_count
from peftplan.arch.load import load_arch

__all__ = ["Activation", "Arch", "Attention", "Experts", "Layer", "Mlp", "NormKind", "load_arch", "parameter_count"]
