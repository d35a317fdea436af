"""Nucleotide Transformer v1 and AgroNT: transformers' ESM classes, so that nothing is registered."""
