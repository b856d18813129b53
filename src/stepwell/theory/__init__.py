"""Theory: learning curves of quantized training without training, in closed form or from one small equation."""
