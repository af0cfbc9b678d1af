"""`pipeline report`: tables and figures of finished runs, beside the paper's."""
