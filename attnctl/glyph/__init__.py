"""The glyph world: small scenes with exact ground truth, and what is trained on them."""
