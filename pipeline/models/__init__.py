"""Teachers and students, their costs, and the folding of a teacher. Nothing here knows data or recipes."""
