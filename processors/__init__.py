"""Methods: one file per paper, its maths as plain functions on tensors and its `Control`.

A method knows the engine (`attnctl`), no model family and no pipeline class.
"""
