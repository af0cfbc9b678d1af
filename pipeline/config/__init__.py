"""Recipes: every number of an experiment, and the strict reading of params.yaml."""
