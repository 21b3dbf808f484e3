"""Faces of other libraries over ebmfast's engines, for loops that are to stay as they are.

`ebmfast.compat.torchebm` has the samplers of torchebm 0.8, `ebmfast.compat.research` the loops of three papers' code.
"""
