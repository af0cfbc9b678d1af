"""What the machine gives: files, locks, devices, memory, a home, signals, threads, canonical JSON, printable text."""
