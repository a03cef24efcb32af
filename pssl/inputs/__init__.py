"""Images and cached activations as a network sees them."""
