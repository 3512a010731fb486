"""Words of prompts: where their tokens are, which of them name things."""
