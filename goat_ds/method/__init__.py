"""The method: tensors in, tensors out. Imports torch only; knows no rank, file, clock or environment."""
