"""The label cache: made by a teacher over views, sealed, opened, replayed, and handed to a student batch by batch."""
