"""A two-stage knowledge-distillation pipeline: CNN teachers, cached labels, small transformer students.

The stages of the command line are in the package `stages`; everything here can be used without it. docs/notebook.md
goes through it: `pipeline.datasets.Dataset`, `pipeline.views.Views`, `pipeline.labels.LabelCache`,
`pipeline.students.build_student`, `pipeline.training.Fit`, `pipeline.evaluation.evaluate`.

Source: arXiv:2502.16762.
"""

__version__ = "0.1.0"
