"""Between diffusers and controls: attention calls, denoiser calls, passes, and their exact restoration."""
