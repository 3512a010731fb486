"""What the methods share that move latents along the gradient of a loss over attention maps."""
