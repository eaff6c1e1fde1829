"""Stands in for torchaudio, which has no build for the CPU torch here; LLaMA-Factory imports it for speech models."""
