"""What people see: tables, progress, figures, the page, and the figures of the paper."""
