"""Teachers and students, their costs, and the folding of a teacher. Nothing here knows data or recipes."""

TEACHERS = {
    "densenet121": "classifier",
    "mobilenet_v3_large": "classifier.3",
    "resnet50": "fc",
    "wide_resnet50_2": "fc",
    "squeezenet1_1": "classifier.1",
    "vgg16": "classifier.6",
    "vgg16_bn": "classifier.6",
    "vgg19": "classifier.6",
}
"""Torchvision's name of the architecture to the name of the layer that makes the logits."""
PAPERS_STUDENTS = ("vit", "deit", "tnt", "titn")
"""The students that take all that a recipe's fields give, and need no arguments of their own."""
