"""Options of the runc shims."""
