"""A two-stage knowledge-distillation pipeline: CNN teachers, cached labels, small transformer students.

The stages of the command line are in the package `stages`; everything here can be used without it.

Source: arXiv:2502.16762.
"""

__version__ = "0.1.0"
