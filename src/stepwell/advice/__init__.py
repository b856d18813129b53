"""What reaches a tolerance on a given grid: rounding, GPTQ or training, with the evidence, the error and the cost of the answer."""
