"""`pipeline report`: tables and figures of whatever has been run, beside the paper's."""
