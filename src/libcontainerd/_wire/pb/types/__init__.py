"""Messages that several services share."""
