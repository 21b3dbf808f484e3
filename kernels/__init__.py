"""Triton kernels, one file per op; installed as `ebmfast.kernels`. Importing a file of it imports triton.

Functions here check nothing: `ebmfast.backends` and the callers of `program` and `accept` do. `ebmfast.reference`, `ebmfast.rng`
and `ebmfast.program` are the specification.
"""
