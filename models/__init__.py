"""What is computed: architectures, layers, attention, weights. torch lives here, and in the workers that call it."""
