"""Triton kernels, installed as `ebmfast.kernels`: none yet in this version (see bench/results/STATUS.md)."""
