"""What reproducing the paper takes: jobs, their order, and how far each of them is."""
