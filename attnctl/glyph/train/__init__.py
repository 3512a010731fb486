"""Training of the models that ship with attnctl: `python -m attnctl.glyph.train {autoencoder,sd,judge}`."""
