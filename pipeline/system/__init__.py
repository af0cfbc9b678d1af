"""What the machine gives: files, locks, devices, signals, threads, canonical JSON, printable text."""
