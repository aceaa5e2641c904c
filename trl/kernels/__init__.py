"""Pieces that know tensors only: quick products and attention, and room for gradients."""
