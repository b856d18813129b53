"""Train, explain, predict and ship quantized neural networks, on the exact grid the runtime will use."""
