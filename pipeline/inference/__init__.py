"""Trained models: loaded, asked, exported, described and timed."""
