"""`pipeline doctor`: whether a full run of a recipe can work here, and what it needs."""
