"""The pattern language: how the tensors of one framework become those of another."""
