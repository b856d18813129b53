"""Optimizers that do the work of a method themselves, in the same pass over memory."""

from stepwell.optim.adamw import AdamW

__all__ = ["AdamW"]
