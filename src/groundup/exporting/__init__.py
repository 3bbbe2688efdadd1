"""A model for programs that do not have groundup: one file a format, each behind the parity gate."""
