"""Teachers and students, their costs, and the folding of a teacher. A leaf: nothing here knows data or recipes."""
