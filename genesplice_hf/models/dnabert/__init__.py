"""DNABERT-1: transformers' BERT classes, so that nothing is registered."""
