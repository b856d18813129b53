"""The Run: a method living on a model and its optimizers."""
