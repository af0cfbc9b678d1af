"""`pipeline doctor`: whether a full run of a recipe can work here, what it needs, and how long it would take."""

from stages.doctor.diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
