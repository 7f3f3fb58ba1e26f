"""Event messages, by what they are about."""
