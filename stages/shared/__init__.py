"""What several commands share: context, options, paths, runs, fitting."""
