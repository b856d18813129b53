"""Recipes: functions without arguments that return one complete, frozen run configuration."""
