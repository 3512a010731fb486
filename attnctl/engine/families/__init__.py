"""One short record a file for each kind of denoiser."""
